"""Copies between two strided boxes: every operator that only moves data is one or a few of them.

Slices, pads, concatenations, transposes and broadcasts differ in strides alone: a broadcast axis
has source stride 0, a reversed one a negative stride. Axes that lie consecutively on both sides are
merged; then the innermost one decides: contiguous on both sides, repeated, interleaved, transposed,
or scalar.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pocktvm.ir.target import Isa
from pocktvm.schedule.emit import load, splat, store, vector_loop
from pocktvm.schedule.loops import ceil_div, grid, tile_at, worth_threads, zero
from pocktvm.schedule.transpose import Matrix, copy_transposed
from pocktvm.tvm_api import T, tirx

Expr = Any
RUN = 4096  # elements of a contiguous run that one task takes
WIDE = ("float32", "int32")  # what is moved as vectors; bytes are left to LLVM


def moved_as(dtype: str, isa: Isa) -> str:
    """The type a kernel that only moves data reads `dtype` as: int32 where integers have the wider
    vectors (Hexagon's HVX), so that floats travel as bits."""
    return "int32" if dtype in WIDE and isa.integer_lanes > isa.lanes else dtype


def move_lanes(dtype: str, isa: Isa) -> int:
    """Elements of `dtype` that one load or store moves."""
    return {"float32": isa.lanes, "int32": isa.integer_lanes}.get(dtype, 1)


def row_major(shape: Sequence[int]) -> list[int]:
    """The stride of every axis of a dense tensor."""
    return [math.prod(shape[i + 1 :]) for i in range(len(shape))]


@dataclass(frozen=True)
class Box:
    """`extents` elements from source_at in steps of `source` to target_at in steps of `target`."""

    extents: tuple[int, ...]
    source: tuple[int, ...]
    target: tuple[int, ...]
    source_at: int = 0
    target_at: int = 0

    def merged(self) -> Box:
        """The same copy with as few axes as can be."""
        axes: list[tuple[int, int, int]] = []
        for extent, s, t in zip(self.extents, self.source, self.target, strict=True):
            if extent == 1:
                continue
            if axes and axes[-1][1] == extent * s and axes[-1][2] == extent * t:
                axes[-1] = (axes[-1][0] * extent, s, t)
            else:
                axes.append((extent, s, t))
        extents, source, target = zip(*axes, strict=True) if axes else ((1,), (1,), (1,))
        return Box(extents, source, target, self.source_at, self.target_at)


def copy_box(box: Box, source: Any, target: Any, dtype: str, isa: Isa) -> None:
    """Write the loops that copy a box, the way its strides are walked fastest."""
    if math.prod(box.extents) == 0:
        return
    box = box.merged()
    parallel = worth_threads(isa, 4 * math.prod(box.extents))
    lanes = move_lanes(dtype, isa)
    if dtype in WIDE and isa.lanes > 1 and is_interleaved(box):
        _interleaved(box, source, target, parallel, isa.lanes)
        return
    inner = transposed_axis(box) if dtype in WIDE and isa.lanes > 1 else None
    if inner is not None:
        _transposed(box, inner, source, target, parallel, isa.lanes)
        return
    extent, step, goal_step = box.extents[-1], box.source[-1], box.target[-1]
    dense = goal_step == 1 and step in (0, 1)
    block = min(extent, RUN)
    for *indices, run in grid((*box.extents[:-1], ceil_div(extent, block)), parallel):
        place = _offset(box.source_at, indices, box.source)
        goal = _offset(box.target_at, indices, box.target)
        for start, count in tile_at(run, extent, block):
            if not dense:
                with T.serial(0, count) as i:
                    value = load(source, place + (start + i) * step, 1)
                    store(target, goal + (start + i) * goal_step, value, 1)
                continue
            for i, w in vector_loop(count, lanes, 2):
                if step == 0:
                    value = splat(load(source, place, 1), w)
                else:
                    value = load(source, place + start + i, w)
                store(target, goal + start + i, value, w)


def is_interleaved(box: Box) -> bool:
    """Do two or three rows of the source make one of the target, as an image's channels do?"""
    if len(box.extents) < 2 or box.extents[-1] not in (2, 3):
        return False
    return (box.source[-2], box.target[-1], box.target[-2]) == (1, 1, box.extents[-1])


def _interleaved(box: Box, source: Any, target: Any, parallel: bool, lanes: int) -> None:
    """A vector of every row, dealt out by shuffles of two vectors each."""
    *lead, length, count = box.extents
    block = min(length, RUN // count)
    for *indices, run in grid((*lead, ceil_div(length, block)), parallel):
        place = _offset(box.source_at, indices, box.source)
        goal = _offset(box.target_at, indices, box.target)
        for start, size in tile_at(run, length, block):
            for i, w in vector_loop(size, lanes):
                at = T.bind(place + start + i)
                rows = [T.bind(load(source, at + c * box.source[-1], w)) for c in range(count)]
                to = T.bind(goal + (start + i) * count)
                for v in range(count):
                    store(target, to + v * w, _dealt(rows, v, w), w)


def _dealt(rows: Sequence[Expr], v: int, width: int) -> Expr:
    """Vector `v` of the rows' values taken in turn."""
    if width == 1:
        return rows[v]
    wanted = [((v * width + i) % len(rows), (v * width + i) // len(rows)) for i in range(width)]
    result = rows[0]
    for number, row in enumerate(rows[1:], 1):
        first = number == 1  # then the lanes of row 0 are not yet in place
        picks = [width + at if c == number else at if c == 0 and first else i
                 for i, (c, at) in enumerate(wanted)]  # fmt: skip
        result = tirx.Shuffle([result, row], picks)
    return result


def transposed_axis(box: Box) -> int | None:
    """The axis that is contiguous in the source, when another one is in the target."""
    if box.target[-1] != 1 or box.source[-1] in (0, 1) or box.extents[-1] < 4:
        return None
    found = [i for i, s in enumerate(box.source[:-1]) if s == 1 and box.extents[i] >= 4]
    return found[0] if found else None


def _transposed(
    box: Box, inner: int, source: Any, target: Any, parallel: bool, lanes: int
) -> None:
    """Rows of the source run along `inner`, rows of the target along the last axis."""
    last = len(box.extents) - 1
    lead = [i for i in range(last) if i != inner]
    rows, block = box.extents[last], min(box.extents[last], 16)
    extents = [*(box.extents[i] for i in lead), ceil_div(rows, block)]
    for *indices, b in grid(extents, parallel):
        place = _offset(box.source_at, indices, [box.source[i] for i in lead])
        goal = _offset(box.target_at, indices, [box.target[i] for i in lead])
        for row, count in tile_at(b, rows, block):
            copy_transposed(
                Matrix(source, place + row * box.source[last], box.source[last]),
                Matrix(target, goal + row, box.target[inner]),
                count,
                box.extents[inner],
                lanes,
            )


def _offset(start: int, indices: Sequence[Expr], strides: Sequence[int]) -> Expr:
    offset: Expr = zero() + start
    for index, stride in zip(indices, strides, strict=False):
        offset = offset + index * stride
    return offset


def fill(buffer: Any, size: int, value: Expr, dtype: str, isa: Isa) -> None:
    """Every element of a buffer."""
    lanes = move_lanes(dtype, isa)
    block = min(size, RUN)
    for (run,) in grid((ceil_div(size, block),), worth_threads(isa, 4 * size)):
        for start, count in tile_at(run, size, block):
            for i, w in vector_loop(count, lanes, 2):
                store(buffer, start + i, splat(value, w), w)
