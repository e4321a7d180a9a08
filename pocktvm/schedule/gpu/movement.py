"""Operators that only move data, or add what was moved: one thread an element of the result.

Every element finds its source; where the forward scattered (scatter_add_elements), it looks at all
that may have come to it, in order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pocktvm.schedule.emit import Context, build, const, load, local, store
from pocktvm.schedule.gpu.launch import choose, threads
from pocktvm.schedule.loops import unflatten, zero
from pocktvm.schedule.rule import Emitted, Knobless, Task
from pocktvm.schedule.rules.movement import bounds, inside
from pocktvm.schedule.strided_copy import row_major
from pocktvm.tvm_api import T, tirx

Expr = Any


@dataclass
class Move:
    """One element of the result: `at` is its index on every axis."""

    ctx: Context
    flat: Expr
    at: list[Expr]

    @property
    def attrs(self) -> Mapping[str, Any]:
        """The operator's attributes."""
        return self.ctx.task.node.attrs

    def shape(self, number: int = 0) -> tuple[int, ...]:
        """The shape of an input."""
        return self.ctx.task.shape(self.ctx.task.node.inputs[number])

    def axis(self, rank: int) -> int:
        """The axis the operator works along."""
        return int(self.attrs.get("axis") or 0) % rank

    @property
    def dtype(self) -> str:
        """The result's dtype."""
        return self.ctx.task.values[self.ctx.task.node.outputs[0]].dtype

    def load(self, index: Expr, number: int = 0) -> Expr:
        """An element of an input."""
        return self.ctx.load(self.ctx.task.node.inputs[number], index, 1)

    def const(self, value: float) -> Expr:
        """A literal of the result's type."""
        return const(value, 1, self.dtype)

    def dot(self, strides: list[int] | tuple[int, ...], first: int = 0) -> Expr:
        """The element that lies `strides` apart on every axis."""
        index: Expr = tirx.const(first, "int32")
        for i, stride in zip(self.at, strides, strict=True):
            index = index + i * stride
        return index


def permute_dims(m: Move) -> Expr:
    """Axis i of the output is axis axes[i] of x."""
    shape = m.shape()
    axes = m.attrs.get("axes") or tuple(reversed(range(len(shape))))
    strides = row_major(shape)
    return m.load(m.dot([strides[a] for a in axes]))


def broadcast_to(m: Move) -> Expr:
    """Stride 0 along new and stretched axes."""
    padded = (1,) * (len(m.at) - len(m.shape())) + m.shape()
    pairs = zip(padded, row_major(padded), strict=True)
    return m.load(m.dot([0 if extent == 1 else stride for extent, stride in pairs]))


def concat(m: Move) -> Expr:
    """The input whose span holds the index; the others are not read."""
    axis = m.axis(len(m.at))
    ends, total = [], 0
    for number in range(len(m.ctx.task.node.inputs)):
        total += m.shape(number)[axis]
        ends.append(total)
    value: Expr = None
    for number in reversed(range(len(ends))):
        strides = row_major(m.shape(number))
        start = ends[number - 1] if number else 0
        source = m.load(m.dot(strides, -start * strides[axis]), number)
        value = source if value is None else choose(m.at[axis] < ends[number], source, value)
    return value


def strided_slice(m: Move) -> Expr:
    """x[begin:end:strides]."""
    strides, picked = row_major(m.shape()), bounds(m.attrs, m.shape())
    first = sum(b * s for (b, _, _), s in zip(picked, strides, strict=True))
    return m.load(m.dot([p[1] * s for p, s in zip(picked, strides, strict=True)], first))


def strided_slice_grad(m: Move) -> Expr:
    """dy where the slice read, else 0."""
    out = m.ctx.task.shape(m.ctx.task.node.outputs[0])
    source, there = zero(), tirx.const(True, "bool")
    for i, (begin, step, count), stride in zip(
        m.at, bounds(m.attrs, out), row_major(m.shape()), strict=True
    ):
        back = T.bind((i - begin) if step > 0 else (begin - i))
        step = abs(step)
        k = T.bind(tirx.FloorDiv(back, step))
        there = tirx.And(there, tirx.And(back >= 0, k < count))
        if step > 1:
            there = tirx.And(there, (k * step).equal(back))
        source = source + k * stride
    return choose(there, m.load(source), m.const(0))


def pad(m: Move) -> Expr:
    """Widths are (before, after) per axis; negative ones crop."""
    shape, mode = m.shape(), m.attrs.get("mode", "constant")
    source, there = zero(), tirx.const(True, "bool")
    for i, before, extent in zip(m.at, m.attrs["pad_width"][::2], shape, strict=True):
        index = T.bind(i - before)
        if mode == "constant":
            there = tirx.And(there, tirx.And(index >= 0, index < extent))
        else:
            index = inside(index, extent, mode)
        source = source * extent + index
    if mode != "constant":
        return m.load(source)
    return choose(there, m.load(source), m.const(m.attrs.get("value", 0)))


def gather_elements(m: Move) -> Expr:
    """x at the index that the second input gives on one axis."""
    axis, strides = m.axis(len(m.at)), row_major(m.shape())
    index = _wrapped(m.load(m.flat, 1), m.shape()[axis])
    around = [0 if a == axis else s for a, s in enumerate(strides)]
    return m.load(m.dot(around) + index * strides[axis])


def scatter_add_elements(m: Move) -> Expr:
    """The sum of dy wherever its index on one axis is this element's."""
    shape, axis = m.shape(), m.axis(len(m.at))
    strides = row_major(shape)
    there = tirx.const(True, "bool")
    for a, extent in enumerate(shape):
        if a != axis:
            there = tirx.And(there, m.at[a] < extent)
    acc = local(1, m.dtype)
    store(acc, 0, m.const(0), 1)
    length = m.ctx.task.shape(m.ctx.task.node.outputs[0])[axis]
    base = T.bind(m.dot([0 if a == axis else s for a, s in enumerate(strides)]))
    with T.If(there), T.Then(), T.serial(0, shape[axis]) as j:
        index = T.bind(base + j * strides[axis])
        with T.If(_wrapped(m.load(index, 1), length).equal(m.at[axis])), T.Then():
            store(acc, 0, load(acc, 0, 1) + m.load(index), 1)
    return load(acc, 0, 1)


def _wrapped(index: Expr, extent: int) -> Expr:
    """Negative indices count from the end."""
    index = T.bind(tirx.Cast("int32", index))
    return T.bind(tirx.Select(index < 0, index + extent, index))


def cumsum(m: Move) -> Expr:
    """The sum of all elements up to this one (after it, in reverse) along an axis."""
    shape, axis = m.shape(), m.axis(len(m.at))
    stride, at = row_major(shape)[axis], m.at[axis]
    acc = local(1, m.dtype)
    store(acc, 0, m.const(0), 1)
    own = 0 if m.attrs.get("exclusive") else 1
    count = (shape[axis] - 1 - at if m.attrs.get("reverse") else at) + own
    way = -stride if m.attrs.get("reverse") else stride
    end = T.bind(m.flat - at * stride + ((shape[axis] - 1) * stride if way < 0 else 0))
    with T.serial(0, count) as k:
        value = tirx.Cast(m.dtype, m.load(end + k * way))
        store(acc, 0, load(acc, 0, 1) + value, 1)
    return load(acc, 0, 1)


BODIES: dict[str, Callable[[Move], Expr]] = {
    f.__name__: f
    for f in (
        permute_dims, broadcast_to, concat, strided_slice, strided_slice_grad, pad,
        gather_elements, scatter_add_elements, cumsum,
    )
}  # fmt: skip


class Movement(Knobless):
    """permute_dims, broadcast_to, concat, slices, pads, gathers and their gradients, cumsum."""

    name = "movement"

    def decline(self, task: Task) -> str | None:
        """Declines groups, other operators, and empty results."""
        if task.node.op not in BODIES:
            return "computes, not only moves"
        return None if task.values[task.node.outputs[0]].size else "an empty tensor"

    def emit(self, task: Task, knobs: Any) -> Emitted:
        """Neighbouring threads write neighbouring elements."""
        out = task.values[task.node.outputs[0]]

        def body(ctx: Context) -> None:
            for flat in threads(math.prod(out.shape)):
                move = Move(ctx, flat, [T.bind(i) for i in unflatten(flat, out.shape)])
                ctx.store(out.name, flat, BODIES[task.node.op](move), 1)

        return Emitted(build(task, body))
