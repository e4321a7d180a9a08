"""Sums, means, maxima, minima and products over any axes, with what comes before and after."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pocktvm.schedule.emit import LOWEST, Context, build, const
from pocktvm.schedule.expression import Position, evaluate, finish, load_operand
from pocktvm.schedule.gpu.elementwise import place
from pocktvm.schedule.gpu.fold import emit_fold, plan_fold
from pocktvm.schedule.inplace import inplace_pairs
from pocktvm.schedule.loops import unflatten, zero
from pocktvm.schedule.reduction import Reduction, analyse
from pocktvm.schedule.rule import Emitted, Knobless, Task
from pocktvm.schedule.rules.reduce import COMBINE
from pocktvm.schedule.rules.reduce import Reduce as CpuReduce
from pocktvm.tvm_api import T

Expr = Any


class Reduce(Knobless):
    """y = f(reduce(g(x, …)), …)."""

    name = "reduce"

    def decline(self, task: Task) -> str | None:
        """Declines what the CPU's rule does: other anchors, other types, empty tensors."""
        return CpuReduce().decline(task)

    def emit(self, task: Task, knobs: Any) -> Emitted:
        """Threads run along the last axis, be it kept or reduced."""
        plan = analyse(task, False)
        out = plan.outer.values[plan.node.outputs[0]]
        fold = plan_fold(task.target.isa, max(out.size, 1), plan.count, plan.axes[-1].reduced)
        workspaces = fold.workspaces(out.dtype)
        combine, starts = COMBINE[plan.node.op]
        first = starts[out.dtype]
        if out.dtype == "float32" and math.isinf(first):
            first = math.copysign(LOWEST, first)

        def body(ctx: Context) -> None:
            inner, outer = replace(ctx, task=plan.inner), replace(ctx, task=plan.outer)

            def write(output: Expr, value: Expr) -> None:
                if plan.node.op == "mean":
                    value = T.bind(value * const(1.0 / plan.count))
                finish(outer, {plan.node.outputs[0]: value}, place(out.shape, output))

            partial = ctx.workspaces[0] if workspaces else None
            emit_fold(fold, lambda o, i: _element(inner, plan, o, i), combine, first, write,
                      partial, out.dtype)  # fmt: skip

        func = build(task, body, workspaces)
        flops = task.values[plan.node.inputs[0]].size
        return Emitted(func, workspaces, inplace_pairs(task), flops=flops)


def _element(ctx: Context, plan: Reduction, output: Expr, index: Expr) -> Expr:
    """x through the prologue, at the index-th value of an output."""
    kept = _indices(output, [a.extent for a in plan.axes if not a.reduced])
    reduced = _indices(index, [a.extent for a in plan.axes if a.reduced])
    places = [(reduced if a.reduced else kept).pop(0) for a in plan.axes]
    row: Expr = zero()
    for axis, at in zip(plan.axes[:-1], places[:-1], strict=True):
        row = row * axis.extent + at
    position = Position(plan.shape, T.bind(row), T.bind(places[-1]), 1)
    name = plan.node.inputs[0]
    values = evaluate(ctx, plan.prologue, {}, position)
    return values[name] if name in values else load_operand(ctx, name, position)


def _indices(flat: Expr, extents: Sequence[int]) -> list[Expr]:
    return unflatten(flat, extents) if extents else []
