"""Softmax and normalisation over the last axes: a block a row.

The formulas are the CPU rule's (schedule/rules/rows.py); here a row's sums are folded by the
threads of a block, each of which reads, and later writes, the same elements in every pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pocktvm.schedule import vector_math as vm
from pocktvm.schedule.emit import LOWEST, Context, build, load, store
from pocktvm.schedule.gpu.launch import BLOCK, blocks, power_of_two, shared_fold, stride_loop
from pocktvm.schedule.loops import ceil_div
from pocktvm.schedule.row import add
from pocktvm.schedule.rule import Emitted, Knobless, Task
from pocktvm.schedule.rules.rows import FUNCTIONS, Rows, row_axes
from pocktvm.schedule.rules.rows import RowOperators as CpuRowOperators
from pocktvm.tvm_api import T, tirx

Expr = Any


@dataclass
class BlockRows(Rows):
    """The rows of one task, each shared by the `count` threads of a block."""

    thread: Expr = None
    count: int = BLOCK

    def _fold(self, value: Callable[[Expr, int], Expr], combine: Any, first: float) -> Expr:
        return shared_fold(
            self.thread, self.count, self.extent, lambda i: value(i, 1), combine, first
        )

    def sum(self, value: Callable[[Expr, int], Expr]) -> Expr:
        """sum_i value(i, 1) over a row."""
        return self._fold(self.counted(value, 0.0), add, 0.0)

    def top(self, x: Any, base: Expr) -> Expr:
        """The largest element of a row of x."""
        value = self.counted(lambda i, w: load(x, base + i, 1), LOWEST)
        return self._fold(value, lambda a, b: tirx.Max(a, b), LOWEST)

    def sum_exp(self, x: Any, base: Expr, top: Expr) -> Expr:
        """sum_i e**(x_i - top) over a row of x."""
        return self.sum(lambda i, w: vm.exp(load(x, base + i, 1) - top, 1))

    def write(self, base: Expr, value: Callable[[Expr, int], Expr]) -> None:
        """Output 0 of a row from value(i, 1)."""
        value = self.counted(value, 0.0)
        for i in stride_loop(self.thread, self.extent, self.count):
            store(self.outputs[0], base + i, value(i, 1), 1)

    def statistic(self, output: int, row: Expr, value: Expr) -> None:
        """One number a row, where the node has that output."""
        if output < len(self.outputs):
            with T.If(self.thread.equal(0)), T.Then():
                store(self.outputs[output], row, value, 1)


class RowOperators(Knobless):
    """softmax, log_softmax, layer_norm, rms_norm and their gradients, over the last axes."""

    name = "rows"

    def decline(self, task: Task) -> str | None:
        """Declines what the CPU's rule does: groups, other axes than the last, other types."""
        return CpuRowOperators().decline(task)

    def emit(self, task: Task, knobs: Any) -> Emitted:
        """A thread takes about four elements of a row."""
        node = task.node
        shape = task.shape(node.outputs[0])
        extent = math.prod(shape[a] for a in row_axes(task))
        count = power_of_two(ceil_div(extent, 4), 32, BLOCK)

        def body(ctx: Context) -> None:
            for row, thread in blocks(math.prod(shape) // extent, count):
                rows = BlockRows(ctx, extent, 1, thread, count)
                rows.diagonal = T.bind(row % extent) if node.attrs.get("causal") else None
                FUNCTIONS[node.op](rows, row, T.bind(row * extent))

        pairs = tuple(
            (0, i) for i, name in enumerate(node.inputs)
            if task.shape(name) == shape and node.inputs.count(name) == 1
            and math.prod(shape) > extent
        )  # fmt: skip
        return Emitted(build(task, body), inplace=pairs, flops=8 * math.prod(shape))
