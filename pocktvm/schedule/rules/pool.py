"""Pooling of NHWC maps: lanes run along channels, windows are loops with bounds.

The gradients gather: each element of dx looks at the windows that span it, so every element has one
owner and an epilogue fits. The maximum's gradient goes to the first maximum of a window in row
order, as in torch: an element gets it when it is above all before it and not below any after it,
or when the forward pass noted its place in the window as that of the maximum (`_indexed`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pocktvm.schedule import emit
from pocktvm.schedule.depthwise import Vectors, each_block
from pocktvm.schedule.emit import LOWEST, Context
from pocktvm.schedule.expression import Position, finish
from pocktvm.schedule.inplace import inplace_pairs
from pocktvm.schedule.rule import Emitted, Knob, Task
from pocktvm.schedule.spatial import anchor_of, decline_spatial, outer
from pocktvm.schedule.window import Axis, Window
from pocktvm.tvm_api import T, tirx

Expr = Any
Span = tuple[Expr, Expr]
VECTORS = 4  # channel vectors at a time: independent sums hide the latency of each


class Pool:
    """max_pool2d, avg_pool2d and their gradients, with places too."""

    name = "pool"

    def decline(self, task: Task) -> str | None:
        """Declines other operators, layouts and types."""
        return decline_spatial(task, *_BODIES)

    def knobs(self, task: Task) -> Mapping[str, Knob]:
        """Channel vectors at a time."""
        return {"vectors": Knob((1, 2, 4), 2 if anchor_of(task).op.endswith("_grad") else VECTORS)}

    def emit(self, task: Task, knobs: Mapping[str, Any]) -> Emitted:
        """One loop over images and rows, then columns, then channels."""
        kernel = PoolNest(task, knobs["vectors"])
        func = emit.build(task, kernel.emit)
        size = task.values[kernel.node.outputs[0]].size
        return Emitted(func, inplace=inplace_pairs(task), flops=size * kernel.taps)


class PoolNest:
    """The loop nest around one output pixel."""

    def __init__(self, task: Task, vectors: int) -> None:
        self.task, self.node, self.vectors = task, anchor_of(task), vectors
        self.out = task.shape(self.node.outputs[0])
        first = task.shape(self.node.inputs[0])
        forward = not self.backward
        small, large = (self.out, first) if forward else (first, self.out)
        pool = tuple(self.node.attrs["pool"])
        self.rows, self.columns = Window.of(self.node.attrs).forward(small[1:3], large[1:3], pool)
        self.taps = pool[0] * pool[1]
        self.body: Callable[..., None] = _BODIES[self.node.op]

    @property
    def backward(self) -> bool:
        """True for gradients, whose windows are those that span an element."""
        return is_gradient(self.node.op)

    def emit(self, ctx: emit.Context) -> None:
        """Write the whole kernel: images and rows, columns, channels."""
        self.ctx = ctx
        n, h, w, c = self.out
        with outer(self.task, n * h, 2 * n * h * w * c * self.taps) as f:
            self.n, self.y = T.bind(f // h), T.bind(f % h)
            rows = self.span(self.rows, self.y)
            with T.serial(0, w) as x:
                self.x = x
                columns = self.span(self.columns, x)
                each_block(c, ctx.lanes, self.vectors,
                           lambda at, v: self.body(self, rows, columns, at, v))  # fmt: skip

    def element(self, ctx: Context, n: Expr, y: Expr, x: Expr, c: Expr) -> None:
        """One element alone: what a thread of a GPU does."""
        self.ctx, self.n, self.y, self.x = ctx, n, y, x
        rows, columns = self.span(self.rows, y), self.span(self.columns, x)
        self.body(self, rows, columns, c, [(0, 1)])

    def span(self, axis: Axis, at: Expr) -> Span:
        """Forward: the valid taps at an output. Gradient: the outputs whose window spans it."""
        return axis.covering(at) if self.backward else axis.bounds(at)

    def load(self, name: str, y: Expr, x: Expr, c: Expr, lanes: int) -> Expr:
        """A vector of pixel (y, x) of the image."""
        _, h, w, channels = self.task.shape(name)
        return self.ctx.load(name, ((self.n * h + y) * w + x) * channels + c, lanes)

    def finish(self, c: Expr, value: Expr, lanes: int, place: Expr = None) -> None:
        """Epilogue and store of a vector, and of the places that go with it."""
        row = (self.n * self.out[1] + self.y) * self.out[2] + self.x
        made = dict(zip(self.node.outputs, (value, place), strict=False))
        finish(self.ctx, made, Position(self.out, row, c, lanes))

    def inverse_count(self, rows: Span, columns: Span) -> Expr:
        """1 / the number of elements a window averages."""
        kh, kw = self.rows.taps, self.columns.taps
        if self.node.attrs.get("count_include_pad", False):
            return emit.const(1.0 / (kh * kw))
        count = (rows[1] - rows[0]) * (columns[1] - columns[0])
        if isinstance(count, int):
            return emit.const(1.0 / count)
        return T.bind(emit.const(1.0) / tirx.Cast("float32", count))

    def windows(self, rows: Span, columns: Span) -> Iterator[tuple[Expr, Expr, Expr, Expr]]:
        """Loops over the windows that span the element: (output y, x, tap y, x).

        The taps are bound: TVM's CanonicalizeLoop loses an outer loop's start inside the bounds of
        an inner loop, but not inside a binding."""
        with T.serial(*rows) as oy:
            ky = T.bind(self.y - self.rows.offset - oy * self.rows.step)
            with T.serial(*columns) as ox:
                kx = T.bind(self.x - self.columns.offset - ox * self.columns.step)
                dy, dx = self.rows.dilation, self.columns.dilation
                if dy == dx == 1:
                    yield oy, ox, ky, kx
                else:
                    with T.If(tirx.And((ky % dy).equal(0), (kx % dx).equal(0))), T.Then():
                        yield oy, ox, T.bind(ky // dy), T.bind(kx // dx)


def is_gradient(op: str) -> bool:
    """True for gradients of poolings."""
    return op.endswith(("_grad", "_scatter"))


def _accumulate(
    self: PoolNest, vectors: Vectors, value: float | Expr, dtype: str = "float32"
) -> Any:
    acc = emit.local(vectors[-1][0] + vectors[-1][1], dtype)
    for start, lanes in vectors:
        if isinstance(value, float):
            emit.store(acc, start, emit.const(value, lanes, dtype), lanes)
        else:
            emit.store(acc, start, emit.splat(value, lanes), lanes)
    return acc


def _forward(self: PoolNest, rows: Span, columns: Span, c: Expr, vectors: Vectors) -> None:
    largest = self.node.op == "max_pool2d"
    acc = _accumulate(self, vectors, LOWEST if largest else 0.0)
    with T.serial(*rows) as ty, T.serial(*columns) as tx:
        y, x = self.rows.source(self.y, ty), self.columns.source(self.x, tx)
        for start, lanes in vectors:
            value = self.load(self.node.inputs[0], y, x, c + start, lanes)
            old = emit.load(acc, start, lanes)
            emit.store(acc, start, tirx.Max(old, value) if largest else old + value, lanes)
    scale = None if largest else self.inverse_count(rows, columns)
    for start, lanes in vectors:
        value = emit.load(acc, start, lanes)
        if scale is not None:
            value = value * emit.splat(scale, lanes)
        self.finish(c + start, value, lanes)


def _indexed(self: PoolNest, rows: Span, columns: Span, c: Expr, vectors: Vectors) -> None:
    """The maximum, and which tap of the window has it: a later one only where it is above all."""
    width = self.columns.taps
    acc = _accumulate(self, vectors, LOWEST)
    first = tirx.const(0, "int32") + rows[0] * width + columns[0]
    places = _accumulate(self, vectors, first, "int32")
    with T.serial(*rows) as ty, T.serial(*columns) as tx:
        y, x = self.rows.source(self.y, ty), self.columns.source(self.x, tx)
        tap = T.bind(ty * width + tx)
        for start, lanes in vectors:
            value = T.bind(self.load(self.node.inputs[0], y, x, c + start, lanes))
            old = T.bind(emit.load(acc, start, lanes))
            place, here = emit.load(places, start, lanes), emit.splat(tap, lanes)
            emit.store(places, start, tirx.Select(value > old, here, place), lanes)
            emit.store(acc, start, tirx.Max(old, value), lanes)
    for start, lanes in vectors:
        bytes_ = "uint8" if lanes == 1 else f"uint8x{lanes}"
        place = T.bind(tirx.Cast(bytes_, emit.load(places, start, lanes)))
        self.finish(c + start, emit.load(acc, start, lanes), lanes, place)


def _scatter(self: PoolNest, rows: Span, columns: Span, c: Expr, vectors: Vectors) -> None:
    """The sum of dy of the windows whose place is this element."""
    dout, places = self.node.inputs
    acc = _accumulate(self, vectors, 0.0)
    for oy, ox, ky, kx in self.windows(rows, columns):
        tap = T.bind(ky * self.columns.taps + kx)
        for start, lanes in vectors:
            ints = "int32" if lanes == 1 else f"int32x{lanes}"
            place = tirx.Cast(ints, self.load(places, oy, ox, c + start, lanes))
            dy = self.load(dout, oy, ox, c + start, lanes)
            here = place.equal(emit.splat(tap, lanes))
            kept = tirx.Select(here, dy, emit.const(0.0, lanes))
            emit.store(acc, start, emit.load(acc, start, lanes) + kept, lanes)
    for start, lanes in vectors:
        self.finish(c + start, emit.load(acc, start, lanes), lanes)


def _avg_grad(self: PoolNest, rows: Span, columns: Span, c: Expr, vectors: Vectors) -> None:
    acc = _accumulate(self, vectors, 0.0)
    for oy, ox, _, _ in self.windows(rows, columns):
        scale = self.inverse_count(self.rows.bounds(oy), self.columns.bounds(ox))
        for start, lanes in vectors:
            dy = self.load(self.node.inputs[0], oy, ox, c + start, lanes)
            total = emit.load(acc, start, lanes) + dy * emit.splat(scale, lanes)
            emit.store(acc, start, total, lanes)
    for start, lanes in vectors:
        self.finish(c + start, emit.load(acc, start, lanes), lanes)


def _max_grad(self: PoolNest, rows: Span, columns: Span, c: Expr, vectors: Vectors) -> None:
    dout, source = self.node.inputs[:2]
    acc = _accumulate(self, vectors, 0.0)
    for oy, ox, ky, kx in self.windows(rows, columns):
        before = _accumulate(self, vectors, LOWEST)
        after = _accumulate(self, vectors, LOWEST)

        def look(into: Any, ys: Span, xs: Span, oy: Expr = oy, ox: Expr = ox) -> None:
            with T.serial(*ys) as ty, T.serial(*xs) as tx:
                y, x = self.rows.source(oy, ty), self.columns.source(ox, tx)
                for start, lanes in vectors:
                    value = self.load(source, y, x, c + start, lanes)
                    emit.store(into, start, tirx.Max(emit.load(into, start, lanes), value), lanes)

        (ylo, yhi), (xlo, xhi) = self.rows.bounds(oy), self.columns.bounds(ox)
        look(before, (ylo, ky), (xlo, xhi))
        look(before, (ky, ky + 1), (xlo, kx))
        look(after, (ky, ky + 1), (kx, xhi))
        look(after, (ky + 1, yhi), (xlo, xhi))
        for start, lanes in vectors:
            value = T.bind(self.load(source, self.y, self.x, c + start, lanes))
            dy = self.load(dout, oy, ox, c + start, lanes)
            zero = emit.const(0.0, lanes)
            kept = tirx.Select(value >= emit.load(after, start, lanes), dy, zero)
            kept = tirx.Select(value > emit.load(before, start, lanes), kept, zero)
            emit.store(acc, start, emit.load(acc, start, lanes) + kept, lanes)
    for start, lanes in vectors:
        self.finish(c + start, emit.load(acc, start, lanes), lanes)


_BODIES: dict[str, Callable[..., None]] = {
    "max_pool2d": _forward,
    "max_pool2d_indexed": _indexed,
    "max_pool2d_scatter": _scatter,
    "avg_pool2d": _forward,
    "avg_pool2d_grad": _avg_grad,
    "max_pool2d_grad": _max_grad,
}
