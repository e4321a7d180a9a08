"""Cross-entropy of logits and integer labels, and its gradient: a block a row.

The formulas are the CPU rule's (schedule/rules/cross_entropy.py). Sums over rows are a second
launch of one block, in a fixed order.
"""

from __future__ import annotations

import math
from typing import Any

from pocktvm.schedule import vector_math as vm
from pocktvm.schedule.emit import LOWEST, Context, build, const, load, store
from pocktvm.schedule.gpu.launch import BLOCK, blocks, power_of_two, shared_fold, stride_loop
from pocktvm.schedule.loops import ceil_div
from pocktvm.schedule.row import add
from pocktvm.schedule.rule import Emitted, Knobless, Task
from pocktvm.schedule.rules.cross_entropy import ClassRows
from pocktvm.schedule.rules.cross_entropy import CrossEntropy as CpuCrossEntropy
from pocktvm.schedule.rules.cross_entropy import CrossEntropyGrad as CpuCrossEntropyGrad
from pocktvm.tvm_api import T, tirx

Expr = Any


class BlockClassRows(ClassRows):
    """Rows whose classes are shared by the threads of a block."""

    def share(self, thread: Expr, count: int) -> None:
        """From here on, for this thread of `count`."""
        self.thread, self.threads = thread, count

    def reduce(self, r: Expr, value: Any, combine: Any, start: float) -> Expr:
        """Combine over the classes of a row."""
        return shared_fold(
            self.thread, self.threads, self.classes, lambda c: value(c, 1), combine, start
        )

    def statistics(self, r: Expr, into: Any = None) -> tuple[Expr, Expr]:
        """(maximum, sum of exponentials) of a row."""

        def logit(c: Expr) -> Expr:
            return load(self.logits, self.at(r, c), 1)

        top = self.reduce(r, lambda c, w: logit(c), lambda a, b: tirx.Max(a, b), LOWEST)
        total = self.reduce(r, lambda c, w: vm.exp(logit(c) - top, 1), add, 0.0)
        return top, total


    def share_loss(self, r: Expr, losses: Any, own: Expr, top: Expr, total: Expr) -> None:
        """A row's loss and weight, by one thread."""
        loss, weight = self.loss(r, own, top, total)
        with T.If(self.thread.equal(0)), T.Then():
            self.keep_loss(r, losses, loss, weight)

    def whole_loss(self, out: str, losses: Any) -> None:
        """A launch of one block that adds the rows' losses."""
        for _, thread in blocks(1, BLOCK):
            loss = _sum(losses, 0, self.count, thread)
            weight = _sum(losses, self.count, self.count, thread)
            with T.If(thread.equal(0)), T.Then():
                self.ctx.store(out, 0, loss if self.summed else loss / weight, 1)


def _threads(task: Task) -> int:
    node = task.node
    return power_of_two(ceil_div(task.shape(node.inputs[0])[node.attrs["axis"]], 4), 32, BLOCK)


class CrossEntropy(Knobless):
    """The mean loss, a scalar."""

    name = "cross_entropy"

    def decline(self, task: Task) -> str | None:
        """Declines groups and every other operator, as the CPU's rule."""
        return CpuCrossEntropy().decline(task)

    def emit(self, task: Task, knobs: Any) -> Emitted:
        """Losses and weights of rows into a workspace, then their sums by one block."""
        node = task.node
        weights = node.inputs[2] if len(node.inputs) > 2 else None
        shape, axis = task.shape(node.inputs[0]), node.attrs["axis"]
        rows_count = math.prod(shape) // shape[axis]
        workspaces = ((2 * rows_count, "float32"),)

        def body(ctx: Context) -> None:
            losses = ctx.workspaces[0]
            for row, thread in blocks(rows_count, _threads(task)):
                rows = BlockClassRows(ctx, weights)
                rows.share(thread, _threads(task))
                rows.share_loss(row, losses, rows.own(row), *rows.statistics(row))
            rows.whole_loss(node.outputs[0], losses)

        return Emitted(build(task, body, workspaces), workspaces)


def _sum(buffer: Any, base: int, count: int, thread: Expr) -> Expr:
    return shared_fold(thread, BLOCK, count, lambda i: load(buffer, base + i, 1), add, 0.0)


class CrossEntropyGrad(Knobless):
    """The gradient of the mean loss for the logits, scaled by dloss."""

    name = "cross_entropy_grad"

    def decline(self, task: Task) -> str | None:
        """Declines groups and every other operator, as the CPU's rule."""
        return CpuCrossEntropyGrad().decline(task)

    def emit(self, task: Task, knobs: Any) -> Emitted:
        """Sums of the labels' weights first, then the rows; may overwrite the logits."""
        node = task.node
        weights = node.inputs[3] if len(node.inputs) > 3 else None
        shape, axis = task.shape(node.inputs[0]), node.attrs["axis"]
        count = math.prod(shape) // shape[axis]
        losses = ((2 * count, "float32"),) if len(node.outputs) > 1 else ()
        workspaces = ((2, "float32"), *losses)

        def body(ctx: Context) -> None:
            rows = BlockClassRows(ctx, weights)
            sums = ctx.workspaces[0]
            for _, thread in blocks(1, BLOCK):
                self._sums(ctx, rows, thread, sums)
            for row, thread in blocks(rows.count, _threads(task)):
                rows.share(thread, _threads(task))
                self._row(ctx, rows, row, load(sums, 0, 1), load(sums, 1, 1))
            if losses:
                rows.whole_loss(node.outputs[1], ctx.workspaces[1])

        func = build(task, body, workspaces, noalias=False)
        return Emitted(func, workspaces, inplace=((0, 0),))

    def _sums(self, ctx: Context, rows: BlockClassRows, thread: Expr, sums: Any) -> None:
        """dloss / D, and the sum of all classes' weights."""

        def weight(r: Expr) -> Expr:
            label, counts = rows.row(r)
            return rows.weight(label) * counts

        total = shared_fold(thread, BLOCK, rows.count, weight, add, 0.0)
        rows.share(thread, BLOCK)
        every = const(float(rows.classes))
        if rows.weights is not None:
            every = rows.reduce(thread, rows.weighted, add, 0.0)
        with T.If(thread.equal(0)), T.Then():
            dloss = ctx.load(ctx.task.node.inputs[2], 0, 1)
            store(sums, 0, dloss if rows.summed else dloss / total, 1)
            store(sums, 1, every, 1)

    def _row(self, ctx: Context, rows: BlockClassRows, r: Expr, scale: Expr, every: Expr) -> None:
        out = ctx.buffers[ctx.task.node.outputs[0]]
        label, counts = rows.row(r)
        own = rows.own(r)  # ahead of the barriers behind which it may be overwritten
        top, total = rows.statistics(r)
        if len(ctx.workspaces) > 1:
            rows.share_loss(r, ctx.workspaces[1], own, top, total)
        scale = T.bind(scale * counts)
        hit = T.bind(const(1 - rows.smoothing) * rows.weight(label) * scale)
        smooth = const(rows.smoothing / rows.classes) * scale
        share = T.bind((hit + smooth * every) / total)
        smooth = T.bind(smooth)
        for c in stride_loop(rows.thread, rows.classes, rows.threads):
            index = T.bind(rows.at(r, c))
            value = vm.exp(load(rows.logits, index, 1) - top, 1) * share
            if rows.smoothing:
                value = value - smooth * rows.weighted(c, 1)
            value = value - tirx.Select(c.equal(label), hit, const(0.0))
            store(out, index, value, 1)
