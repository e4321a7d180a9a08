"""Sums, means, maxima, minima and products over any axes, with what comes before and after.

Two forms. When the last axis is kept (a bias gradient, a spatial mean of an NHWC tensor), lanes run
along it and each task walks down the reduced axes. When it is reduced, lanes run along it and are
combined at the end of each row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pocktvm.ir.ops import REDUCTIONS
from pocktvm.schedule.emit import (
    Context,
    build,
    const,
    load,
    local,
    reduce_lanes,
    store,
    vectors,
)
from pocktvm.schedule.expression import Position, evaluate, finish, known_op, load_operand
from pocktvm.schedule.gemm_tile import epilogue_cost
from pocktvm.schedule.inplace import inplace_pairs
from pocktvm.schedule.loops import ceil_div, grid, tile_at, worth_threads, zero
from pocktvm.schedule.reduction import Axis, Reduction, analyse, split_body
from pocktvm.schedule.rule import Emitted, Knob, Task
from pocktvm.tvm_api import T, tirx

Expr = Any
COMBINE: dict[str, tuple[Callable[[Expr, Expr], Expr], dict[str, float]]] = {
    "sum": (lambda a, b: a + b, {"float32": 0.0, "int32": 0}),
    "mean": (lambda a, b: a + b, {"float32": 0.0}),
    "max": (lambda a, b: tirx.Max(a, b), {"float32": -math.inf, "int32": -(2**31)}),
    "min": (lambda a, b: tirx.Min(a, b), {"float32": math.inf, "int32": 2**31 - 1}),
    "prod": (lambda a, b: a * b, {"float32": 1.0, "int32": 1}),
}


class Reduce:
    """y = f(reduce(g(x, …)), …)."""

    name = "reduce"

    def decline(self, task: Task) -> str | None:
        """Declines other anchors, types without lanes of 4 bytes, and empty tensors."""
        anchor = task.anchor
        if anchor is None or anchor.op not in REDUCTIONS:
            return "no reduction"
        prologue, node, epilogue = split_body(task)
        dtype = task.values[node.outputs[0]].dtype
        if dtype not in COMBINE[node.op][1] or task.values[node.inputs[0]].dtype != dtype:
            return f"a {node.op} of {task.values[node.inputs[0]].dtype}"
        unknown = [n.op for n in (*prologue, *epilogue) if not known_op(n.op)]
        if unknown:
            return f"no vector expression for {', '.join(unknown)}"
        if task.values[node.inputs[0]].size == 0:
            return "an empty tensor"
        inside = {o for n in prologue for o in n.outputs}
        if any(name in inside for n in epilogue for name in n.inputs):
            return "the epilogue reads what the prologue computes"
        return None

    def knobs(self, task: Task) -> Mapping[str, Knob]:
        """`vectors`: how many accumulators a task keeps in registers."""
        heavy = epilogue_cost(split_body(task)[0]) > 8
        return {"vectors": Knob((1, 2, 4, 8, 16), 2 if heavy else 8)}

    def emit(self, task: Task, knobs: Mapping[str, Any]) -> Emitted:
        """One or two stages; see schedule/reduction.py for the parts."""
        prologue, node, _ = split_body(task)
        isa = task.target.isa
        work = task.values[node.inputs[0]].size * epilogue_cost(prologue)
        parallel = worth_threads(isa, work)
        tasks = task.values[node.outputs[0]].size
        if not analyse(task, False).axes[-1].reduced:
            tasks = ceil_div(tasks, isa.lanes * knobs["vectors"])
        plan = analyse(task, parallel and tasks < 2 * isa.cores)
        nest = _Nest(plan, knobs["vectors"], parallel)
        size = task.values[node.outputs[0]].size
        workspaces: tuple[tuple[int, str], ...] = ()
        if plan.parts > 1:
            workspaces = ((plan.parts * size, task.values[node.outputs[0]].dtype),)
        func = build(task, nest.body, workspaces)
        return Emitted(func, workspaces, inplace_pairs(task), flops=work)


class _Nest:
    """Emits a reduction."""

    def __init__(self, plan: Reduction, vectors_: int, parallel: bool) -> None:
        self.plan, self.vectors, self.parallel = plan, vectors_, parallel
        self.node = plan.node
        self.out = plan.outer.values[self.node.outputs[0]]
        self.combine, starts = COMBINE[self.node.op]
        self.start = starts[self.out.dtype]

    def body(self, ctx: Context) -> None:
        """Write the whole kernel."""
        self.inner = replace(ctx, task=self.plan.inner)
        self.outer = replace(ctx, task=self.plan.outer)
        self.partial = ctx.workspaces[0] if ctx.workspaces else None
        if self.plan.axes[-1].reduced:
            self._rows(ctx)
        else:
            self._columns(ctx)
        if self.partial is not None:
            self._combine_parts(ctx)

    def _element(self, row: Expr, column: Expr, width: int) -> Expr:
        """x at a position, through the prologue."""
        at = Position(self.plan.shape, row, column, width)
        name = self.node.inputs[0]
        values = evaluate(self.inner, self.plan.prologue, {}, at)
        return values[name] if name in values else load_operand(self.inner, name, at)

    def _take(self, acc: Any, i: int, row: Expr, column: Expr, width: int) -> None:
        """Fold x at a position into accumulator i."""
        value = self._element(row, column, width)
        store(acc, i, self.combine(load(acc, i, width), value), width)

    def _write(self, part: Expr, index: Expr, value: Expr, width: int) -> None:
        """A finished element, or a part of it; `index` is flat over the outputs."""
        if self.partial is not None:
            store(self.partial, part * self.out.size + index, value, width)
            return
        self._finish(index, value, width)

    def _finish(self, index: Expr, value: Expr, width: int) -> None:
        if self.node.op == "mean":
            value = value * const(1.0 / self.plan.count, width)
        last = self.out.shape[-1] if self.out.shape else 1
        flat = len(self.out.shape) < 2
        row, column = (zero(), index) if flat else (index // last, index % last)
        at = Position(self.out.shape, row, column, width)
        finish(self.outer, {self.node.outputs[0]: T.bind(value)}, at)

    def _lead(self) -> tuple[list[Axis], list[Axis]]:
        lead = self.plan.axes[:-1]
        return [a for a in lead if not a.reduced], [a for a in lead if a.reduced]

    def _row(self, kept: Mapping[Axis, Expr], reduced: Mapping[Axis, Expr]) -> Expr:
        """The flat index over all axes but the last."""
        row: Expr = zero()
        for axis in self.plan.axes[:-1]:
            row = row * axis.extent + (reduced if axis.reduced else kept)[axis]
        return row

    def _place(self, kept: Mapping[Axis, Expr]) -> tuple[Expr, Expr]:
        """(part, flat index over the kept axes) of a task."""
        part: Expr = zero()
        index: Expr = zero()
        for axis in self.plan.axes[:-1]:
            if axis.part:
                part = kept[axis]
            elif not axis.reduced:
                index = index * axis.extent + kept[axis]
        return part, index

    def _columns(self, ctx: Context) -> None:
        """Lanes along the last axis, which is kept."""
        kept, reduced = self._lead()
        columns = self.plan.axes[-1].extent
        # vectors may not cross rows of an output whose last axis is another one (of extent 1)
        aligned = len(self.out.shape) < 2 or self.out.shape[-1] == columns
        lanes = ctx.lanes if aligned else 1
        block = min(columns, lanes * self.vectors)
        extents = [a.extent for a in kept] + [ceil_div(columns, block)]
        for *indices, b in grid(extents, self.parallel):
            where = dict(zip(kept, indices, strict=True))
            part, index = self._place(where)
            for column, width in tile_at(b, columns, block):
                pieces = vectors(width, lanes)
                acc = self._walk(where, reduced, column, pieces, width)
                for c, w in pieces:
                    self._write(part, index * columns + column + c, load(acc, c, w), w)

    def _walk(
        self,
        where: Mapping[Axis, Expr],
        reduced: Sequence[Axis],
        column: Expr,
        pieces: Sequence[tuple[int, int]],
        width: int,
    ) -> Any:
        """Accumulate rows; several sets of accumulators where one would wait for itself."""
        last = reduced[-1].extent if reduced else 1
        sets = max(1, min(self.vectors // len(pieces), last))
        acc = local(sets * width, self.out.dtype)
        for s in range(sets):
            for c, w in pieces:
                store(acc, s * width + c, const(self.start, w, self.out.dtype), w)

        def take(s: int, indices: Mapping[Axis, Expr]) -> None:
            row = T.bind(self._row(where, indices))
            for c, w in pieces:
                self._take(acc, s * width + c, row, column + c, w)

        for outer in nest(reduced[:-1]):
            if not reduced:
                take(0, {})
                continue
            steps = last // sets
            with T.serial(0, steps) as i:
                for s in range(sets):
                    take(s, {**outer, reduced[-1]: i * sets + s})
            for s in range(last % sets):
                take(s, {**outer, reduced[-1]: tirx.const(steps * sets + s, "int32")})
        for s in range(1, sets):
            for c, w in pieces:
                both = self.combine(load(acc, c, w), load(acc, s * width + c, w))
                store(acc, c, both, w)
        return acc

    def _rows(self, ctx: Context) -> None:
        """Lanes along the last axis, which is reduced."""
        kept, reduced = self._lead()
        extent, lanes = self.plan.axes[-1].extent, ctx.lanes
        sets = max(1, min(self.vectors // 2, extent // lanes))
        steps = extent // (lanes * sets)
        rest = vectors(extent - steps * lanes * sets, lanes)
        offsets = [(s * lanes, lanes) for s in range(sets)] if steps else []
        size = len(offsets) * lanes
        tails = []
        for start, width in rest:
            tails.append((size, steps * lanes * sets + start, width))
            size += width
        for indices in grid([a.extent for a in kept], self.parallel):
            where = dict(zip(kept, indices, strict=True))
            acc = local(size, self.out.dtype)
            for i, w in (*offsets, *((i, w) for i, _, w in tails)):
                store(acc, i, const(self.start, w, self.out.dtype), w)

            for inside in nest(reduced):
                row = T.bind(self._row(where, inside))
                if steps:
                    with T.serial(0, steps) as k:
                        for i, w in offsets:
                            self._take(acc, i, row, k * (lanes * sets) + i, w)
                for i, column, w in tails:
                    self._take(acc, i, row, tirx.const(column, "int32"), w)
            part, index = self._place(where)
            self._write(part, index, self._collect(acc, offsets, tails), 1)

    def _collect(
        self,
        acc: Any,
        offsets: Sequence[tuple[int, int]],
        tails: Sequence[tuple[int, int, int]],
    ) -> Expr:
        """One scalar from all accumulators, pairwise."""
        full = [load(acc, i, w) for i, w in offsets]
        while len(full) > 1:
            full = [
                self.combine(full[i], full[i + 1]) if i + 1 < len(full) else full[i]
                for i in range(0, len(full), 2)
            ]
        scalars = [reduce_lanes(v, offsets[0][1], self.combine, self.out.dtype) for v in full]
        scalars += [
            reduce_lanes(load(acc, i, w), w, self.combine, self.out.dtype) for i, _, w in tails
        ]
        result = scalars[0]
        for scalar in scalars[1:]:
            result = self.combine(result, scalar)
        return T.bind(result)

    def _combine_parts(self, ctx: Context) -> None:
        """The second stage: all parts of each output element, in order."""
        size, parts = self.out.size, self.plan.parts
        last = self.out.shape[-1] if self.out.shape else 1
        with T.serial(0, size // last) as row:
            for column, width in _pieces(last, ctx.lanes):
                index = row * last + column
                total = load(self.partial, index, width)
                for part in range(1, parts):
                    total = self.combine(total, load(self.partial, part * size + index, width))
                self._finish(index, total, width)


def _pieces(extent: int, lanes: int) -> Iterator[tuple[Expr, int]]:
    full = extent // lanes
    if full:
        with T.serial(0, full) as i:
            yield i * lanes, lanes
    for start, width in vectors(extent - full * lanes, lanes):
        yield tirx.const(full * lanes + start, "int32"), width


def nest(axes: Sequence[Axis]) -> Iterator[dict[Axis, Expr]]:
    """Serial loops over axes; yields the index on each."""
    if not axes:
        yield {}
        return
    with T.serial(0, axes[0].extent) as i:
        for rest in nest(axes[1:]):
            yield {axes[0]: i, **rest}
