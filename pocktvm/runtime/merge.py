"""Folds trained adapters into the weights they adapt, with numpy alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def merge_adapters(
    state: Mapping[str, np.ndarray], adapters: Mapping[str, Mapping[str, Any]]
) -> dict[str, np.ndarray]:
    """`state` with W + scale * B A for each adapted W, without the A and B.

    `adapters` is the manifest's table: weight -> names of `a` and `b`, `scale`, and whether the
    weight lies inputs × outputs (`turned`).
    """
    merged = dict(state)
    for weight, entry in adapters.items():
        a, b = merged.pop(entry["a"]), merged.pop(entry["b"])
        inner = a.reshape(len(a), -1)
        update = b.reshape(len(b), -1).astype(np.float64) @ inner.astype(np.float64)
        update = update.T if entry["turned"] else update
        base = state[weight]
        merged[weight] = (base + entry["scale"] * update.reshape(base.shape)).astype(base.dtype)
    return merged
