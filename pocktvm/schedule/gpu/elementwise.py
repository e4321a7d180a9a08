"""Chains of elementwise operators: one thread an element."""

from __future__ import annotations

from typing import Any

from pocktvm.schedule.emit import Context, build
from pocktvm.schedule.expression import Position, evaluate, store_outputs
from pocktvm.schedule.gpu.launch import threads
from pocktvm.schedule.loops import zero
from pocktvm.schedule.rule import Emitted, Knobless, Task
from pocktvm.schedule.rules.elementwise import Elementwise as CpuElementwise
from pocktvm.schedule.rules.elementwise import flatten, same_index_pairs
from pocktvm.tvm_api import T

Expr = Any


class Elementwise(Knobless):
    """y[i] = f(a[i], b[i], …) over one common shape, operands broadcast."""

    name = "elementwise"

    def decline(self, task: Task) -> str | None:
        """Only groups without an anchor, and single elementwise nodes."""
        if any(task.values[o].size == 0 for o in task.node.outputs):
            return "an empty tensor"
        return CpuElementwise().decline(task)

    def emit(self, task: Task, knobs: Any) -> Emitted:
        """Neighbouring threads take neighbouring elements."""
        pairs = same_index_pairs(task)
        task = flatten(task)
        out = task.values[task.node.outputs[0]]

        def body(ctx: Context) -> None:
            for flat in threads(max(out.size, 1)):
                at = place(out.shape, flat)
                store_outputs(ctx, evaluate(ctx, task.node.kernel_nodes(), {}, at), at)

        return Emitted(build(task, body), inplace=pairs)


def place(shape: tuple[int, ...], flat: Expr) -> Position:
    """The position of a flat index over `shape`."""
    if len(shape) < 2:
        return Position(shape, zero(), flat, 1)
    return Position(shape, T.bind(flat // shape[-1]), T.bind(flat % shape[-1]), 1)
