"""Reading rows of a table by index, and adding gradients back to them without atomics.

A row of the table is owned by the first index that names it: its block adds the gradients of all
later ones, in order. The same bits every time, and no thread waits for another.
"""

from __future__ import annotations

import math
from typing import Any

from pocktvm.schedule.emit import Context, build, const, load, local, store
from pocktvm.schedule.gpu.launch import blocks, power_of_two, shared_fold, threads
from pocktvm.schedule.loops import ceil_div
from pocktvm.schedule.rule import Emitted, Knobless, Task
from pocktvm.schedule.rules.embedding import Table, describe_table, index_input
from pocktvm.schedule.rules.embedding import Take as CpuTake
from pocktvm.schedule.rules.embedding import TakeGrad as CpuTakeGrad
from pocktvm.schedule.rules.put import Put as CpuPut
from pocktvm.tvm_api import T, tirx

Expr = Any


def larger(a: Expr, b: Expr) -> Expr:
    """max(a, b), as `fold` combines two values."""
    return tirx.Max(a, b)


class Take(Knobless):
    """y[o, i, :] = table[o, indices[i], :]."""

    name = "take"

    def decline(self, task: Task) -> str | None:
        """Declines groups and indices that are not int32."""
        return CpuTake().decline(task)

    def emit(self, task: Task, knobs: Any) -> Emitted:
        """One thread an element."""
        table, indices = task.node.inputs
        t = describe_table(task, table)

        def body(ctx: Context) -> None:
            for flat in threads(t.outer * t.count * t.inner):
                c, rest = T.bind(flat % t.inner), T.bind(flat // t.inner)
                o, i = T.bind(rest // t.count), T.bind(rest % t.count)
                row = t.row(ctx.load(indices, i, 1))
                value = ctx.load(table, (o * t.length + row) * t.inner + c, 1)
                ctx.store(task.node.outputs[0], flat, value, 1)

        return Emitted(build(task, body))


class TakeGrad(Knobless):
    """dtable[o, indices[i], :] += dy[o, i, :] from zeros; as an update, table[…] -= lr * dy."""

    name = "take_grad"

    def decline(self, task: Task) -> str | None:
        """Declines groups, indices that are not int32, gradients that are not float32."""
        return CpuTakeGrad().decline(task)

    def emit(self, task: Task, knobs: Any) -> Emitted:
        """Zeros everywhere (a gradient), then a block for each index and set of columns."""
        node = task.node
        update = node.op == "take_update"
        t = describe_table(task, node.outputs[0])
        skipped = node.attrs.get("padding_idx", -1)
        skipped = -1 if skipped is None else int(skipped)
        width = power_of_two(t.inner, 32, 128)
        sets = ceil_div(t.inner, width)

        def body(ctx: Context) -> None:
            def row_of(i: Expr) -> Expr:
                return t.row(ctx.load(index_input(task), i, 1))

            for flat in () if update else threads(t.outer * t.length * t.inner):
                ctx.store(node.outputs[0], flat, const(0.0), 1)
            for block, thread in blocks(t.outer * t.count * sets, width):
                c = T.bind(block % sets * width + thread)
                rest = T.bind(block // sets)
                o, i = T.bind(rest // t.count), T.bind(rest % t.count)
                row = row_of(i)

                def same(j: Expr, row: Expr = row) -> Expr:
                    return tirx.Cast("int32", row_of(j).equal(row))

                named = shared_fold(thread, width, i, same, larger, 0, "int32")
                owner = tirx.And(named.equal(0), tirx.And(c < t.inner, tirx.NE(row, skipped)))
                with T.If(owner), T.Then():
                    self._add(ctx, t, o, i, c, row, row_of)

        return Emitted(build(task, body), inplace=((0, 0),) if update else ())

    def _add(
        self, ctx: Context, t: Table, o: Expr, i: Expr, c: Expr, row: Expr, row_of: Any
    ) -> None:
        node = ctx.task.node
        update = node.op == "take_update"
        dy, out = node.inputs[int(update)], node.outputs[0]
        acc = local(1)
        store(acc, 0, const(0.0), 1)
        with T.serial(0, t.count - i) as k:
            j = T.bind(i + k)
            with T.If(row_of(j).equal(row)), T.Then():
                value = ctx.load(dy, (o * t.count + j) * t.inner + c, 1)
                store(acc, 0, load(acc, 0, 1) + value, 1)
        goal, total = T.bind((o * t.length + row) * t.inner + c), load(acc, 0, 1)
        if update:
            total = ctx.load(out, goal, 1) - ctx.load(node.inputs[3], 0, 1) * total
        ctx.store(out, goal, total, 1)


class Put(Knobless):
    """table[o, indices[i], :] = rows[o, i, :], where the table lies; indices are distinct."""

    name = "put"

    def decline(self, task: Task) -> str | None:
        """Declines anything but rows at int32 indices."""
        return CpuPut().decline(task)

    def emit(self, task: Task, knobs: Any) -> Emitted:
        """One thread an element of the rows."""
        node = task.node
        _, indices, rows = node.inputs
        shape, axis = task.shape(node.outputs[0]), int(node.attrs["axis"])
        outer, inner = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
        count = task.values[indices].size

        def body(ctx: Context) -> None:
            for flat in threads(outer * count * inner):
                c, rest = T.bind(flat % inner), T.bind(flat // inner)
                row = ctx.load(indices, rest % count, 1)
                goal = (rest // count * shape[axis] + row) * inner + c
                ctx.store(node.outputs[0], goal, ctx.load(rows, flat, 1), 1)

        return Emitted(build(task, body), inplace=((0, 0),))
