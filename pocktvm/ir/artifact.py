"""What codegen needs to know of a build besides its kernels and plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pocktvm.ir.model import Input


@dataclass(frozen=True)
class SelfTest:
    """Recorded by the unfused reference: a batch, the first losses and output."""

    inputs: Mapping[str, np.ndarray]
    losses: tuple[float, ...]
    output: np.ndarray | None = None
    lr: float = 1e-3


@dataclass(frozen=True)
class Identity:
    """Facts of the build that go to manifest.json and into the library."""

    model: str
    target: str
    scheme: str
    loss: str
    optimizer: str
    lr: float
    batch: int
    inputs: tuple[Input, ...]  # x…, then labels
    output_shape: tuple[int, ...]
    updated: Mapping[str, float]  # torch name -> share of the tensor that learns
    state: Mapping[str, np.ndarray]  # every torch parameter, torch's layout, before training
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
