"""What the zoo's files share: options, seeded weights, layers, example inputs."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocktvm.errors import PockError

IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_SCALE = (1 / 58.395, 1 / 57.12, 1 / 57.375)


MAY_BE_ZERO = frozenset({"types"})  # options with another default


def same_name(name: str) -> str:
    """Names in weight files that are the zoo's own."""
    return name


@dataclass(frozen=True)
class ZooModel:
    """A module with what a build wants to know of it.

    scheme  the published sparse scheme as patterns, or None
    mean, scale  a uint8 pixel becomes (u8 - mean[c]) * scale[c]
    rename  name in a published file of weights -> name in `module`, None for one to ignore
    fresh   prefixes of parameters that `--weights` leaves as they are (option head=new)
    """

    module: nn.Module
    example_inputs: tuple[Tensor, ...]
    scheme: Mapping[str, Any] | None = None
    mean: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()
    loss: str = "cross_entropy"
    rename: Callable[[str], str | None] = same_name
    fresh: tuple[str, ...] = ()


def read_options(
    model: str, defaults: Mapping[str, Any], given: Mapping[str, str]
) -> dict[str, Any]:
    """Defaults overridden by text. A tuple as default lists the words allowed, the first is it."""
    values = {k: v[0] if isinstance(v, tuple) else v for k, v in defaults.items()}
    for key, text in given.items():
        if key not in defaults:
            close = difflib.get_close_matches(key, list(defaults), n=3, cutoff=0.4)
            raise PockError(
                f"the zoo model '{model}' has no option '{key}'"
                + (f"; nearest: {', '.join(close)}" if close else "")
                + f".\n  It has: {', '.join(f'{k}={v}' for k, v in values.items())}."
            )
        values[key] = _parse(model, key, defaults[key], text)
    return values


def _parse(model: str, key: str, default: Any, text: str) -> Any:
    if isinstance(default, tuple):
        if text not in default:
            raise PockError(f"{model}: {key} is one of {', '.join(default)}, not '{text}'.")
        return text
    try:
        value = type(default)(text)
    except ValueError:
        value = -1
    if value < 0 or (value == 0 and default and key not in MAY_BE_ZERO):
        kind = "a whole number" if isinstance(default, int) else "a number"
        raise PockError(f"{model}: {key} is {kind} such as {default}, not '{text}'.")
    return value


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers inside come from `seed`; the caller's generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def build_seeded(seed: int, make: Callable[[], nn.Module]) -> nn.Module:
    """A module with seeded weights, in inference form."""
    with seeded(seed):
        return make().eval()


def images(batch: int, size: int, channels: int = 3) -> Tensor:
    """A seeded batch of normalised images."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, channels, size, size, generator=generator)


def tokens(batch: int, length: int, vocabulary: int) -> Tensor:
    """A seeded batch of token ids."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, vocabulary, (batch, length), generator=generator)


SETTLING_SIZE = 128


def settle_statistics(
    module: nn.Module, size: int = 64, channels: int = 3, branches: Iterable[nn.Module] = ()
) -> None:
    """Give batch norms the statistics of seeded images, and gains and shifts off 1 and 0.

    So activations keep their scale through the depth and a step's loss falls, as in a trained net.
    Rounded, since convolutions differ in their last bits between machines. `branches` are the last
    norms of residual branches: small, as training leaves them, or the sum grows with the depth.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    if not norms:
        return
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.8, 1.2)
        nn.init.normal_(norm.bias, std=0.1)
    for norm in branches:
        nn.init.uniform_(norm.weight, 0.15, 0.3)
    momentum = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    module.train()
    with torch.no_grad():
        # small images end in maps of one pixel: eight samples are no variance to divide by
        module(images(8, max(size, SETTLING_SIZE), channels))
    module.eval()
    for norm, value in zip(norms, momentum, strict=True):
        norm.momentum = value
        norm.running_mean.copy_(norm.running_mean.round(decimals=3))
        norm.running_var.copy_(norm.running_var.round(decimals=3).clamp_min(1e-3))
        norm.num_batches_tracked.zero_()


class SameConv2d(nn.Conv2d):
    """A convolution with TensorFlow's SAME padding: the odd row goes right and below."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, O, ceil(H / stride), ceil(W / stride))."""
        pad = []
        for size, kernel, stride in zip(
            (x.shape[-1], x.shape[-2]), self.kernel_size[::-1], self.stride[::-1], strict=True
        ):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pad += [total // 2, total - total // 2]
        return super().forward(F.pad(x, pad))


class ConvNorm(nn.Sequential):
    """Convolution `0`, batch norm `1` (when folded: a bias in `0` instead), activation."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 1,
        stride: int = 1,
        *,
        groups: int = 1,
        act: type[nn.Module] | None = nn.ReLU6,
        same: bool = False,
        folded: bool = False,
        eps: float = 1e-5,
    ) -> None:
        make = SameConv2d if same and kernel > 1 else nn.Conv2d
        padding = 0 if make is SameConv2d else (kernel - 1) // 2
        conv = make(inputs, outputs, kernel, stride, padding, groups=groups, bias=folded)
        layers: list[nn.Module] = [conv]
        if not folded:
            layers.append(nn.BatchNorm2d(outputs, eps=eps))
        if act is not None:
            layers.append(act())
        super().__init__(*layers)


def fold_norms(model: nn.Module) -> None:
    """Move the statistics of a built net's batch norms into the convolutions in front of them."""
    for block in [m for m in model.modules() if isinstance(m, ConvNorm)]:
        conv, norm = block[0], block[1]
        scale = (norm.weight / torch.sqrt(norm.running_var + norm.eps)).detach()
        conv.weight.data.mul_(scale.view(-1, 1, 1, 1))
        conv.bias = nn.Parameter(norm.bias.detach() - norm.running_mean * scale)
        rest = [layer for layer in block if layer not in (conv, norm)]
        del block[1:]
        block.extend(rest)
