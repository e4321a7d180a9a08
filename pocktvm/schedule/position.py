"""Where a vector lies in a tensor, and in tensors that broadcast to it.

A position in a tensor of shape S is its flat index over S, the flat index `row` over all axes but
the last, and the index `column` on the last axis; a vector covers `width` consecutive columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pocktvm.errors import InternalError
from pocktvm.tvm_api import tirx

Expr = Any


@dataclass(frozen=True)
class Position:
    """Where a vector lies in a tensor of `shape`."""

    shape: tuple[int, ...]
    row: Expr
    column: Expr
    width: int

    @property
    def flat(self) -> Expr:
        """Index of the first lane over the whole tensor."""
        last = self.shape[-1] if self.shape else 1
        return self.row * last + self.column

    def coordinates(self) -> list[Expr]:
        """The index on every axis but the last (division and remainder by build-time extents)."""
        coordinates: list[Expr] = []
        rest = self.row
        for extent in reversed(self.shape[1:-1]):
            coordinates.append(rest % extent)
            rest = rest // extent
        if len(self.shape) > 1:
            coordinates.append(rest)
        return coordinates[::-1]


def broadcast_row(shape: Sequence[int], at: Position) -> Expr:
    """Flat index over all axes but the last of an operand of `shape`, right-aligned with `at`."""
    if len(shape) > len(at.shape):
        raise InternalError(f"operand {list(shape)} has more axes than the output {at.shape}")
    padded = (1,) * (len(at.shape) - len(shape)) + tuple(shape)
    if all(extent == 1 for extent in padded[:-1]):
        return tirx.const(0, "int32")
    if padded[:-1] == at.shape[:-1]:
        return at.row
    index: Expr = tirx.const(0, "int32")
    for extent, coordinate in zip(padded[:-1], at.coordinates(), strict=True):
        index = index * extent + (coordinate if extent > 1 else 0)
    return index


def flat_index(shape: Sequence[int], at: Position) -> Expr:
    """Row-major index of the first lane in a tensor of `shape` that broadcasts to the position's.
    Rules see views of a tensor's axes, never another order of them."""
    size = math.prod(shape)
    if size == math.prod(at.shape):
        return at.flat
    if size == 1:
        return tirx.const(0, "int32")
    if shape[-1] != at.shape[-1]:
        raise InternalError(f"values of {list(shape)} inside loops over {list(at.shape)}")
    return broadcast_row(shape, at) * shape[-1] + at.column
