"""Softmax and normalisation over the last axes: one row at a time, rows in parallel.

A row is read two or three times and stays in the first-level cache; exponentials are vectors
(schedule/vector_math.py: libm's would be three times slower than torch). Every element is read for
the last time before the same one is written, so results may overwrite operands of their shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pocktvm.schedule import vector_math as vm
from pocktvm.schedule.emit import (
    LOWEST,
    Context,
    build,
    const,
    load,
    splat,
    store,
    vector_loop,
    vectors,
)
from pocktvm.schedule.loops import grid, worth_threads
from pocktvm.schedule.row import Combine, add, reduce_row, row_sum_exp
from pocktvm.schedule.rule import Emitted, Knob, Task
from pocktvm.tvm_api import T, tirx

Expr = Any
Value = Callable[[Expr, int], Expr]  # (first element, width) -> a vector of a row
WORK = {"softmax": 40, "log_softmax": 30, "log_softmax_grad": 30}  # instructions an element


@dataclass
class Rows:
    """The rows of one task: `extent` consecutive elements each.

    `diagonal`: the last element of the current row that counts, for causal operators.
    """

    ctx: Context
    extent: int
    unroll: int
    diagonal: Expr = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        node = self.ctx.task.node
        self.inputs = [self.ctx.buffers[n] for n in node.inputs]
        self.outputs = [self.ctx.buffers[n] for n in node.outputs]
        self.attrs = node.attrs

    def counted(self, value: Value, other: float) -> Value:
        """`value` up to the diagonal, `other` behind it."""
        if self.diagonal is None:
            return value
        return lambda i, w: tirx.Select(
            (i if w == 1 else tirx.Ramp(i, 1, w)) <= splat(self.diagonal, w),
            value(i, w), const(other, w),
        )  # fmt: skip

    def sum(self, value: Value) -> Expr:
        """sum_i value(i, width) over a row."""
        return self._reduce(self.counted(value, 0.0), add, 0.0)

    def _reduce(self, value: Value, combine: Combine, first: float) -> Expr:
        end = None if self.diagonal is None else self.diagonal + 1
        return reduce_row(self.ctx, self.extent, value, combine, first, end)

    def mean(self, value: Callable[[Expr, int], Expr]) -> Expr:
        """The sum over the row's length."""
        return T.bind(self.sum(value) * const(1.0 / self.extent))

    def top(self, x: Any, base: Expr) -> Expr:
        """The largest element of a row of x."""
        value = self.counted(lambda i, w: load(x, base + i, w), LOWEST)
        return self._reduce(value, lambda a, b: tirx.Max(a, b), LOWEST)

    def sum_exp(self, x: Any, base: Expr, top: Expr) -> Expr:
        """sum_i e**(x_i - top) over a row of x."""
        return row_sum_exp(self.ctx, x, base, self.extent, top)

    def write(self, base: Expr, value: Callable[[Expr, int], Expr]) -> None:
        """Output 0 of a row from value(i, width)."""
        if self.diagonal is not None:
            self._write_causal(base, self.counted(value, 0.0))
            return
        for i, width in vector_loop(self.extent, self.ctx.lanes, self.unroll):
            store(self.outputs[0], base + i, value(i, width), width)

    def _write_causal(self, base: Expr, value: Value) -> None:
        lanes, y = self.ctx.lanes, self.outputs[0]
        full = self.extent // lanes
        stop = T.bind(tirx.Min(full, (self.diagonal + lanes) // lanes))
        with T.serial(0, stop) as i:
            store(y, base + i * lanes, value(i * lanes, lanes), lanes)
        with T.serial(stop, full) as i:
            store(y, base + i * lanes, const(0.0, lanes), lanes)
        for start, width in vectors(self.extent - full * lanes, lanes):
            at = tirx.const(full * lanes + start, "int32")
            store(y, base + at, value(at, width), width)

    def statistic(self, output: int, row: Expr, value: Expr) -> None:
        """One number a row, where the node has that output."""
        if output < len(self.outputs):
            store(self.outputs[output], row, value, 1)


def softmax(rows: Rows, row: Expr, base: Expr) -> None:
    """e**(x - max) / sum."""
    x, y = rows.inputs[0], rows.outputs[0]
    top = rows.top(x, base)

    def exponential(i: Expr, width: int) -> Expr:
        value = vm.exp(load(x, base + i, width) - splat(top, width), width)
        store(y, base + i, value, width)
        return value

    total = rows.sum(exponential)
    scale = T.bind(const(1.0) / total)
    rows.write(base, lambda i, w: load(y, base + i, w) * splat(scale, w))


def log_softmax(rows: Rows, row: Expr, base: Expr) -> None:
    """x - max - log(sum)."""
    x = rows.inputs[0]
    top = rows.top(x, base)
    total = rows.sum_exp(x, base, top)
    shift = T.bind(top + tirx.log(total))
    rows.write(base, lambda i, w: load(x, base + i, w) - splat(shift, w))


def softmax_grad(rows: Rows, row: Expr, base: Expr) -> None:
    """y (dy - sum(dy y))."""
    dy, y = rows.inputs
    dot = rows.sum(lambda i, w: load(dy, base + i, w) * load(y, base + i, w))
    rows.write(base, lambda i, w: load(y, base + i, w) * (load(dy, base + i, w) - splat(dot, w)))


def log_softmax_grad(rows: Rows, row: Expr, base: Expr) -> None:
    """dy - e**y sum(dy)."""
    dy, y = rows.inputs
    total = rows.sum(lambda i, w: load(dy, base + i, w))
    rows.write(
        base,
        lambda i, w: load(dy, base + i, w) - vm.exp(load(y, base + i, w), w) * splat(total, w),
    )


def layer_norm(rows: Rows, row: Expr, base: Expr) -> None:
    """(x - mean) rstd g + b; mean and rstd (biased variance) are kept."""
    x, g, b = rows.inputs
    mean = rows.mean(lambda i, w: load(x, base + i, w))

    def centred(i: Expr, width: int) -> Expr:
        return T.bind(load(x, base + i, width) - splat(mean, width))

    def squared(i: Expr, width: int) -> Expr:
        d = centred(i, width)
        return d * d

    variance = rows.mean(squared)
    rstd = T.bind(const(1.0) / tirx.sqrt(variance + const(float(rows.attrs["eps"]))))
    rows.statistic(1, row, mean)
    rows.statistic(2, row, rstd)
    rows.write(base, lambda i, w: centred(i, w) * splat(rstd, w) * load(g, i, w) + load(b, i, w))


def rms_norm(rows: Rows, row: Expr, base: Expr) -> None:
    """x rstd g; rstd = 1 / sqrt(mean(x x) + eps) is kept."""
    x, g = rows.inputs

    def squared(i: Expr, width: int) -> Expr:
        value = T.bind(load(x, base + i, width))
        return value * value

    square = rows.mean(squared)
    rstd = T.bind(const(1.0) / tirx.sqrt(square + const(float(rows.attrs["eps"]))))
    rows.statistic(1, row, rstd)
    rows.write(base, lambda i, w: load(x, base + i, w) * splat(rstd, w) * load(g, i, w))


def layer_norm_grad(rows: Rows, row: Expr, base: Expr) -> None:
    """rstd (d - mean(d) - xhat mean(d xhat)), d = dy g, xhat = (x - mean) rstd."""
    dy, x, g, mean_, rstd_ = rows.inputs
    mean, rstd = T.bind(load(mean_, row, 1)), T.bind(load(rstd_, row, 1))
    _norm_grad(rows, base, dy, g, rstd, True, lambda i, w: (
        (load(x, base + i, w) - splat(mean, w)) * splat(rstd, w)
    ))  # fmt: skip


def rms_norm_grad(rows: Rows, row: Expr, base: Expr) -> None:
    """rstd (d - xhat mean(d xhat)), d = dy g, xhat = x rstd."""
    dy, x, g, rstd_ = rows.inputs
    rstd = T.bind(load(rstd_, row, 1))
    _norm_grad(rows, base, dy, g, rstd, False, lambda i, w: load(x, base + i, w) * splat(rstd, w))


def _norm_grad(
    rows: Rows,
    base: Expr,
    dy: Any,
    g: Any,
    rstd: Expr,
    centred: bool,
    xhat: Callable[[Expr, int], Expr],
) -> None:
    def d(i: Expr, width: int) -> Expr:
        return T.bind(load(dy, base + i, width) * load(g, i, width))

    shift = rows.mean(d) if centred else None
    spread = rows.mean(lambda i, w: d(i, w) * xhat(i, w))

    def value(i: Expr, width: int) -> Expr:
        result = d(i, width) - xhat(i, width) * splat(spread, width)
        if shift is not None:
            result = result - splat(shift, width)
        return splat(rstd, width) * result

    rows.write(base, value)


FUNCTIONS: dict[str, Callable[[Rows, Expr, Expr], None]] = {
    f.__name__: f
    for f in (
        softmax,
        log_softmax,
        softmax_grad,
        log_softmax_grad,
        layer_norm,
        layer_norm_grad,
        rms_norm,
        rms_norm_grad,
    )
}


class RowOperators:
    """softmax, log_softmax, layer_norm, rms_norm and their gradients, over the last axes."""

    name = "rows"

    def decline(self, task: Task) -> str | None:
        """Declines groups, other axes than the last, and non-float32."""
        node = task.node
        if node.op not in FUNCTIONS:
            return "no row operator"
        shape = task.shape(node.outputs[0])
        axes = row_axes(task)
        if not shape or axes != tuple(range(len(shape) - len(axes), len(shape))):
            return f"axes {list(axes)} are not the last of {list(shape)}"
        if any(task.values[n].dtype != "float32" for n in (*node.inputs, *node.outputs)):
            return "not float32"
        return None if math.prod(shape) else "an empty tensor"

    def knobs(self, task: Task) -> Mapping[str, Knob]:
        """`unroll`: how many vectors an iteration of the writing pass computes."""
        return {"unroll": Knob((1, 2, 4), 2)}

    def emit(self, task: Task, knobs: Mapping[str, Any]) -> Emitted:
        """One loop over rows."""
        node = task.node
        shape = task.shape(node.outputs[0])
        extent = math.prod(shape[a] for a in row_axes(task))
        count = math.prod(shape) // extent
        work = math.prod(shape) * WORK.get(node.op, 8)

        def body(ctx: Context) -> None:
            rows = Rows(ctx, extent, knobs["unroll"])
            for (row,) in grid((count,), worth_threads(task.target.isa, work)):
                rows.diagonal = T.bind(row % extent) if node.attrs.get("causal") else None
                FUNCTIONS[node.op](rows, row, T.bind(row * extent))

        func = build(task, body)
        pairs = tuple(
            (0, i) for i, name in enumerate(node.inputs)
            if task.shape(name) == shape and node.inputs.count(name) == 1 and count > 1
        )  # fmt: skip
        return Emitted(func, inplace=pairs, flops=work)


def row_axes(task: Task) -> tuple[int, ...]:
    """The axes a row operator works along, sorted."""
    node = task.node
    rank = len(task.shape(node.outputs[0]))
    axes = node.attrs.get("axes", (node.attrs.get("axis", -1),))
    return tuple(sorted(a % rank for a in axes)) if rank else ()
