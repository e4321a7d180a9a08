"""Train the same module with torch and with an artifact, and compare what users would compare."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

import pocktvm
from pocktvm.frontend.resolve import Source, resolve_model
from pocktvm.manifest import read_manifest

STEPS = 10
# Zoo models at shapes that compile and train in seconds; every operator of the full ones is there.
REDUCED = {
    "mlp": ("mlp:inputs=20,hidden=24,depth=3,classes=5", 4),
    "cnn": ("cnn:channels=8,depth=3,image=12,classes=5", 4),
    "mobilenetv2": ("mobilenetv2:width=0.35,image=32,classes=10", 2),
    "mcunet": ("mcunet:image=64,classes=10", 2),
    "resnet18": ("resnet18:image=32,classes=10", 2),
    "resnet50": ("resnet50:image=32,classes=10", 2),
    "vit-tiny": ("vit-tiny:depth=3,dim=32,heads=2,image=32", 2),
    "bert": ("bert:depth=3,dim=32,heads=2,hidden=64,vocab=60,positions=24,tokens=12", 2),
    "distilbert": (
        "distilbert:depth=3,dim=32,heads=2,hidden=64,vocab=60,positions=24,tokens=12",
        2,
    ),
    "llama": ("llama:depth=3,dim=32,heads=4,kv=2,hidden=48,vocab=60,tokens=12", 2),
}
SCHEMES = ("full", "last", "bias:2", "pockengine")


@dataclass(frozen=True)
class Work:
    """A module with one batch."""

    source: Source
    x: tuple[torch.Tensor, ...]
    y: torch.Tensor

    @classmethod
    def of(cls, spec: str, batch: int, seed: int = 0) -> Work:
        """A zoo model with random labels that fit its output."""
        source = resolve_model(spec, batch=batch)
        x = source.example_inputs
        with torch.no_grad():
            output = copy.deepcopy(source.module).eval()(*x)
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, output.shape[1], (output.shape[0], *output.shape[2:]))
        return cls(source, tuple(x), torch.from_numpy(labels))


def torch_run(
    work: Work,
    trained: Iterable[str],
    make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    steps: int = STEPS,
    parts: Mapping[str, tuple[int, list[int]]] | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and the final state dict of torch under the same scheme; of a tensor in `parts` only
    those indices of that axis learn."""
    module = copy.deepcopy(work.source.module).eval().to(dtype)
    x = tuple(t.to(dtype) if t.is_floating_point() else t for t in work.x)
    names = set(trained)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if name in names:
            names.update(
                n for n, p in module.named_parameters(remove_duplicate=False) if p is parameter
            )
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in names)
    optimizer = make_optimizer([p for p in module.parameters() if p.requires_grad])
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(module(*x), work.y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        with torch.no_grad():
            for name, (axis, indices) in (parts or {}).items():
                chosen = (slice(None),) * axis + (indices,)
                trained = module.get_parameter(name)[chosen].clone()
                module.get_parameter(name).copy_(work.source.module.get_parameter(name))
                module.get_parameter(name)[chosen] = trained
    return losses, module.float().state_dict()


def trained_parts(artifact: pocktvm.Artifact) -> dict[str, tuple[int, list[int]]]:
    """Tensor -> (axis, indices) of those that learn in part."""
    tensors = read_manifest(artifact.path)["tensors"].items()
    return {n: (t["axis"], t["indices"]) for n, t in tensors if "indices" in t}


def our_run(
    artifact: pocktvm.Artifact, work: Work, lr: float, steps: int = STEPS
) -> tuple[list[float], dict[str, np.ndarray]]:
    """Losses and the final state dict of an artifact."""
    arrays = [t.numpy() for t in (*work.x, work.y)]
    with artifact.load() as trainer:
        losses = [trainer.step(*arrays, lr=lr) for _ in range(steps)]
        return losses, trainer.state_dict()


def narrow_beside_plain(
    work: Work, saved: str, out: Path, lr: float = 2e-3, steps: int = 50
) -> tuple[pocktvm.Artifact, float, list[float], list[float]]:
    """Trained in full with narrowed and with whole activations: the narrow artifact in `out`, the
    ratio of their transient bytes, and the losses of both."""
    module, inputs = work.source.module, work.source.example_inputs
    options = dict(scheme="full", optimizer=pocktvm.SGD(lr=lr), published=work.source.scheme)
    plain = pocktvm.compile(module, inputs, **options)
    narrow = pocktvm.compile(module, inputs, saved=saved, out=out, **options)
    less, whole = (a.plan.arena_bytes - a.plan.persistent_bytes for a in (narrow, plain))
    (ours, _), (theirs, _) = (our_run(a, work, lr, steps) for a in (narrow, plain))
    return narrow, less / whole, ours, theirs


def assert_losses_equal(ours: list[float], theirs: list[float]) -> None:
    """Within 1e-4 of max(|loss|, 0.01), step by step."""
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert abs(a - b) <= 1e-4 * max(abs(b), 0.01), f"step {step}: {a} != {b}\n{ours}\n{theirs}"


def assert_updates_equal(
    ours: dict[str, np.ndarray],
    theirs: dict[str, torch.Tensor],
    start: dict[str, torch.Tensor],
    trained: Iterable[str],
    exempt: Callable[[str], bool] = lambda name: False,
) -> None:
    """Updates within 1e-3 of the larger of update and weight; frozen tensors bit-identical."""
    learns = set(trained)
    aliases = {
        n for n, t in start.items()
        if any(t.data_ptr() == start[m].data_ptr() for m in learns if m in start)
    }  # fmt: skip
    learns |= aliases
    for name, before in start.items():
        if name not in ours:
            continue
        was, new, reference = before.numpy(), ours[name], theirs[name].numpy()
        if name not in learns:
            assert np.array_equal(new, was), f"{name} is frozen but changed"
        elif not exempt(name):
            difference = np.linalg.norm(new - reference)
            scale = max(np.linalg.norm(reference - was), np.linalg.norm(was))
            assert difference <= 1e-3 * scale, f"{name}: {difference / max(scale, 1e-30):.2e}"
