"""Operators that only move data: transposes, slices and their gradients, pads, concatenations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pocktvm.schedule.emit import Context, build, const
from pocktvm.schedule.loops import grid, worth_threads
from pocktvm.schedule.rule import Emitted, Knobless, Task
from pocktvm.schedule.strided_copy import Box, copy_box, fill, moved_as, row_major
from pocktvm.tvm_api import T, tirx

Expr = Any
Bounds = list[tuple[int, int, int]]  # (begin, step, count) of every axis


class Movement(Knobless):
    """permute_dims, broadcast_to, concat, strided_slice, strided_slice_grad, pad."""

    name = "movement"

    def decline(self, task: Task) -> str | None:
        """Declines groups, other operators, and empty results."""
        node = task.node
        if node.op not in BODIES:
            return "computes, not only moves"
        return None if task.values[node.outputs[0]].size else "an empty tensor"

    def emit(self, task: Task, knobs: Mapping[str, Any]) -> Emitted:
        """Boxes from inputs to the output."""
        names = (*task.node.inputs, *task.node.outputs)
        bits = {n: moved_as(task.values[n].dtype, task.target.isa) for n in names}
        return Emitted(build(task, lambda ctx: BODIES[task.node.op](_Move(ctx)), dtypes=bits))


class _Move:
    """The only output and the inputs of a task."""

    def __init__(self, ctx: Context) -> None:
        self.ctx, self.node, self.isa = ctx, ctx.task.node, ctx.task.target.isa
        self.out = ctx.task.values[self.node.outputs[0]]
        self.target = ctx.buffers[self.out.name]
        self.dtype = moved_as(self.out.dtype, self.isa)

    def shape(self, number: int = 0) -> tuple[int, ...]:
        """The shape of an input."""
        return self.ctx.task.shape(self.node.inputs[number])

    def copy(self, box: Box, number: int = 0) -> None:
        """From an input to the output."""
        source = self.ctx.buffers[self.node.inputs[number]]
        copy_box(box, source, self.target, self.dtype, self.isa)

    def fill(self, value: float) -> None:
        """Write `value` all over the output."""
        if self.dtype != self.out.dtype:
            value = int(np.array(value, self.out.dtype).view(self.dtype))
        fill(self.target, self.out.size, const(value, 1, self.dtype), self.dtype, self.isa)


def permute_dims(move: _Move) -> None:
    """Axis i of the output is axis axes[i] of x."""
    shape = move.shape()
    axes = move.node.attrs.get("axes") or tuple(reversed(range(len(shape))))
    strides = row_major(shape)
    out = move.out.shape
    move.copy(Box(out, tuple(strides[a] for a in axes), tuple(row_major(out))))


def broadcast_to(move: _Move) -> None:
    """Stride 0 along new and stretched axes."""
    out, shape = move.out.shape, move.shape()
    padded = (1,) * (len(out) - len(shape)) + shape
    pairs = zip(padded, row_major(padded), strict=True)
    source = tuple(0 if extent == 1 else stride for extent, stride in pairs)
    move.copy(Box(out, source, tuple(row_major(out))))


def concat(move: _Move) -> None:
    """Copy every input to its place in the output, as one box."""
    axis = move.node.attrs.get("axis", 0) % len(move.out.shape)
    strides = tuple(row_major(move.out.shape))
    start = 0
    for number in range(len(move.node.inputs)):
        shape = move.shape(number)
        box = Box(shape, tuple(row_major(shape)), strides, 0, start * strides[axis])
        move.copy(box, number)
        start += shape[axis]


def bounds(attrs: Mapping[str, Any], shape: Sequence[int]) -> Bounds:
    """Python's meaning of begin, end and strides on every axis."""
    steps = attrs.get("strides") or (1,) * len(shape)
    found = []
    for begin, end, step, extent in zip(attrs["begin"], attrs["end"], steps, shape, strict=True):
        picked = range(extent)[slice(begin, end, step)]
        found.append((picked.start, picked.step, len(picked)))
    return found


def _sliced(shape: Sequence[int], picked: Bounds) -> tuple[int, tuple[int, ...]]:
    """(offset, strides) of the picked elements of a dense tensor."""
    strides = row_major(shape)
    at = sum(b * s for (b, _, _), s in zip(picked, strides, strict=True))
    return at, tuple(step * s for (_, step, _), s in zip(picked, strides, strict=True))


def strided_slice(move: _Move) -> None:
    """x[begin:end:strides]."""
    at, source = _sliced(move.shape(), bounds(move.node.attrs, move.shape()))
    out = move.out.shape
    move.copy(Box(out, source, tuple(row_major(out)), at))


def strided_slice_grad(move: _Move) -> None:
    """dy placed into zeros."""
    shape, out = move.shape(), move.out.shape
    at, target = _sliced(out, bounds(move.node.attrs, out))
    if math.prod(shape) < move.out.size:
        move.fill(0)
    move.copy(Box(shape, tuple(row_major(shape)), target, 0, at))


def pad(move: _Move) -> None:
    """Widths are (before, after) per axis; negative ones crop."""
    attrs, shape, out = move.node.attrs, move.shape(), move.out.shape
    before = attrs["pad_width"][::2]
    if attrs.get("mode", "constant") != "constant":
        _pad_by_index(move, before, attrs["mode"])
        return
    first = [max(-b, 0) for b in before]
    goal = [max(b, 0) for b in before]
    extents = tuple(
        max(0, min(n - f, o - g)) for n, f, o, g in zip(shape, first, out, goal, strict=True)
    )
    if math.prod(extents) < move.out.size:
        move.fill(attrs.get("value", 0))
    source, target = row_major(shape), row_major(out)
    source_at = sum(f * s for f, s in zip(first, source, strict=True))
    target_at = sum(g * s for g, s in zip(goal, target, strict=True))
    move.copy(Box(extents, tuple(source), tuple(target), source_at, target_at))


def _pad_by_index(move: _Move, before: Sequence[int], mode: str) -> None:
    """reflect and edge: every output element finds its source."""
    shape, out = move.shape(), move.out.shape
    source = move.node.inputs[0]
    for indices in grid(out, worth_threads(move.isa, 8 * move.out.size)):
        place: Expr = tirx.const(0, "int32")
        goal: Expr = tirx.const(0, "int32")
        for index, width, extent, total in zip(indices, before, shape, out, strict=True):
            place = place * extent + inside(index - width, extent, mode)
            goal = goal * total + index
        move.ctx.store(move.out.name, goal, move.ctx.load(source, place, 1), 1)


def inside(index: Expr, extent: int, mode: str) -> Expr:
    """The source of an index outside [0, extent): mirrored, or the edge."""
    last, zero = tirx.const(extent - 1, "int32"), tirx.const(0, "int32")
    if mode == "reflect" and extent > 1:
        index = T.bind(index)
        index = T.bind(tirx.Max(index, zero - index))
        index = last - tirx.Max(last - index, index - last)
    return tirx.Max(tirx.Min(index, last), zero)


BODIES: dict[str, Callable[[_Move], None]] = {
    f.__name__: f
    for f in (permute_dims, broadcast_to, concat, strided_slice, strided_slice_grad, pad)
}
