"""Dropout's masks in numpy: what every target's kernels compute (see schedule/dropout.py)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from pocktvm.ir.graph import Node, Value
from pocktvm.reference.registry import Tensor, reference

_64 = 2**64 - 1


def step_seed(seed: int, t: int) -> int:
    """The int32 scalar of step t (counted from 1) of a run with this seed, as the runtime's."""
    word = _splitmix(_splitmix(seed & _64) + t) >> 32
    return word - 2**32 if word >= 2**31 else word


def dropout_mask(
    shape: Sequence[int], p: float, key: int, seed: int, start: int = 0
) -> np.ndarray:
    """True where an element is kept. `seed` is the step's, `key` counts the model's dropouts,
    `start` is the index of the first element (of a part of a batch)."""
    count = int(np.prod(shape, dtype=np.int64))
    a = _mix(np.array([(seed % 2**32) ^ (key * 0x9E3779B9 % 2**32)], np.uint32))
    b = _mix(a + np.uint32(0x85EBCA6B))
    h = _mix(_mix(np.arange(start, start + count, dtype=np.uint32) + a) + b)
    return (h >> np.uint32(8) >= round(p * 2**24)).reshape(tuple(shape))


def _mix(h: np.ndarray) -> np.ndarray:
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        h = (h ^ (h >> np.uint32(shift))) * np.uint32(factor)
    return h ^ (h >> np.uint32(16))


def _splitmix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _64
    return x ^ (x >> 31)


@reference("dropout")
def dropout(node: Node, args: Sequence[Tensor], outs: Sequence[Value]) -> Tensor:
    """x / (1 - p) where the mask keeps, else 0."""
    x, seed = args
    at = node.attrs.get("start", 0)
    mask = dropout_mask(x.shape, node.attrs["p"], node.attrs["key"], int(seed), at)
    scaled = x * float(1.0 / (1.0 - node.attrs["p"]))
    return torch.where(torch.from_numpy(mask), scaled, torch.zeros_like(x))
