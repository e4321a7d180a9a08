"""Artifacts that keep masks and places have torch's losses, and those without masks bit for bit."""

from __future__ import annotations

import json
import shutil
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

import pocktvm
from pocktvm.targets import load_target

pytestmark = pytest.mark.build
STEPS, LR = 6, 0.05


def network() -> nn.Module:
    """Prime numbers of channels; only biases learn, so that nothing but masks is kept."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 13, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(13, 13, 3, padding=1, groups=13), nn.ReLU6(),
        nn.Conv2d(13, 23, 1), nn.Hardtanh(-0.5, 0.5), nn.Conv2d(23, 37, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(37, 5),
    )  # fmt: skip


def batch() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((4, 3, 12, 12)).astype(np.float32), rng.integers(0, 5, 4)


def torchs() -> list[float]:
    module, (x, y), losses = network(), batch(), []
    biases = [p for n, p in module.named_parameters() if n.endswith("bias")]
    optimizer = torch.optim.SGD(biases, lr=LR)
    for _ in range(STEPS):
        loss = nn.functional.cross_entropy(module(torch.from_numpy(x)), torch.from_numpy(y))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def ours(folder, target: str, small: int = 0) -> tuple[list[float], str, int]:
    """(losses, what the kernels compute, arena bytes)."""
    x, y = batch()
    with mock.patch.multiple("pocktvm.passes.save_masks", SMALL=small, SPAN=1):
        artifact = pocktvm.compile(
            network(), (torch.from_numpy(x),), target=target, scheme={"*.bias": 1},
            optimizer=pocktvm.SGD(lr=LR), out=folder / f"{target}{small}",
        )  # fmt: skip
    trainer = artifact.load()
    losses = [trainer.step(x, y) for _ in range(STEPS)]
    calls = json.loads((artifact.path / "manifest.json").read_text())["timeline"]["step"]
    return losses, " ".join(c["call"] for c in calls), artifact.plan.arena_bytes


def test_the_host_has_the_same_bits_with_masks(tmp_path, monkeypatch):
    monkeypatch.setenv("POCKTVM_CHECK", "1")
    losses, calls, arena = ours(tmp_path, "host")
    assert calls.count("pack_mask") == calls.count("apply_mask") == 4
    assert "max_pool2d_indexed" in calls and "max_pool2d_scatter" in calls
    np.testing.assert_allclose(losses, torchs(), rtol=1e-5)
    whole, calls, more = ours(tmp_path, "host", 1 << 40)
    assert "mask" not in calls and arena < more
    assert losses == whole


@pytest.mark.emulated
@pytest.mark.parametrize("target", ["rpi4", "armv7", "hexagon-v67"])
def test_so_have_other_devices(tmp_path, target):
    emulator = load_target(target).emulator[0]
    if shutil.which(emulator) is None:
        pytest.skip(f"{emulator} is not installed")
    losses, calls, _ = ours(tmp_path, target)
    assert calls.count("pack_mask") == 4
    np.testing.assert_allclose(losses, torchs(), rtol=2e-5)
