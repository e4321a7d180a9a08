"""ResNet-18 and ResNet-50 (He et al., arXiv 1512.03385; stride in the 3×3, as torchvision's).

torchvision's names are understood by `--weights`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from pocktvm.models.common import (
    IMAGENET_MEAN,
    IMAGENET_SCALE,
    ConvNorm,
    ZooModel,
    build_seeded,
    images,
    read_options,
    settle_statistics,
)

OPTIONS = {"depth": 50, "image": 128, "classes": 10, "head": ("file", "new"), "seed": 0}

# blocks in each of the four stages
STAGES = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}
# blocks of the published scheme; the paper gives ResNet-50's, half the depth is ours for 18
LEARNING_BLOCKS = {18: 4, 50: 8}


class Basic(nn.Module):
    """Two 3×3 convolutions (`c1`, `c2`) and the input, projected by `down` where it must be."""

    widening = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.c1 = ConvNorm(inputs, width, 3, stride, act=nn.ReLU)
        self.c2 = ConvNorm(width, width, 3, act=None)
        self.down = _projection(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, O, H / stride, W / stride)."""
        y = self.c2(self.c1(x))
        return F.relu(y + (x if self.down is None else self.down(x)))


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1 (`c1`, `c2`, `c3`) and the input, projected by `down` where it must be."""

    widening = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = self.widening * width
        self.c1 = ConvNorm(inputs, width, act=nn.ReLU)
        self.c2 = ConvNorm(width, width, 3, stride, act=nn.ReLU)
        self.c3 = ConvNorm(width, outputs, act=None)
        self.down = _projection(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, O, H / stride, W / stride)."""
        y = self.c3(self.c2(self.c1(x)))
        return F.relu(y + (x if self.down is None else self.down(x)))


def _projection(inputs: int, outputs: int, stride: int) -> ConvNorm | None:
    fits = stride == 1 and inputs == outputs
    return None if fits else ConvNorm(inputs, outputs, 1, stride, act=None)


class ResNet(nn.Module):
    """Images (N, 3, H, W) to logits (N, classes)."""

    def __init__(self, depth: int = 50, classes: int = 10) -> None:
        super().__init__()
        kind = Basic if depth == 18 else Bottleneck
        self.stem = ConvNorm(3, 64, 7, 2, act=nn.ReLU)
        inputs, blocks = 64, []
        for stage, repeats in enumerate(STAGES[depth]):
            for repeat in range(repeats):
                stride = 2 if stage > 0 and repeat == 0 else 1
                blocks.append(kind(inputs, 64 << stage, stride))
                inputs = kind.widening * (64 << stage)
        self.blocks = nn.ModuleList(blocks)
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) to logits (N, classes)."""
        x = F.max_pool2d(self.stem(x), 3, 2, 1)
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean((2, 3)))


def published_scheme(depth: int) -> dict[str, int]:
    """PockEngine's: biases and first convolution of the last blocks, and the classifier."""
    count = sum(STAGES[depth])
    scheme: dict[str, int] = {}
    for block in range(count - LEARNING_BLOCKS[depth], count):
        scheme[f"blocks.{block}.*.1.bias"] = 1
        scheme[f"blocks.{block}.c1.0.weight"] = 1
    return scheme | {"fc.*": 1}


def zoo_name(name: str, stages: tuple[int, ...]) -> str:
    """torchvision's names: layer2.0.conv1.weight -> blocks.3.c1.0.weight."""
    match = re.fullmatch(r"layer(\d)\.(\d+)\.(.*)", name)
    if match:
        block = sum(stages[: int(match[1]) - 1]) + int(match[2])
        rest = re.sub(r"^conv(\d)\.", r"c\1.0.", match[3])
        rest = re.sub(r"^bn(\d)\.", r"c\1.1.", rest)
        return f"blocks.{block}.{rest.replace('downsample.', 'down.')}"
    return re.sub(r"^bn1\.", "stem.1.", re.sub(r"^conv1\.", "stem.0.", name))


def build(options: Mapping[str, str], batch: int) -> ZooModel:
    """The zoo's entry."""
    depth = int(options["depth"])
    o = read_options(f"resnet{depth}", OPTIONS, options)

    def make() -> nn.Module:
        model = ResNet(depth, o["classes"])
        last = "c3" if depth == 50 else "c2"
        branches = [getattr(block, last)[1] for block in model.blocks]
        settle_statistics(model, branches=branches)
        return model

    return ZooModel(
        module=build_seeded(o["seed"], make),
        example_inputs=(images(batch, o["image"]),),
        scheme=published_scheme(depth),
        mean=IMAGENET_MEAN,
        scale=IMAGENET_SCALE,
        rename=lambda name: zoo_name(name, STAGES[depth]),
        fresh=("fc.",) if o["head"] == "new" else (),
    )
