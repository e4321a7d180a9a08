"""Reading rows of a table by index, and adding gradients back to them.

The table is [outer, V, inner] around the axis, the indices are flat. Adding is done by one task a
block of columns, in the order of the indices: the same bits with any number of threads. An index
out of range is clamped, so that a wrong label cannot write past the table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pocktvm.schedule.emit import Context, build, const, load, splat, store, vector_loop
from pocktvm.schedule.loops import ceil_div, grid, tile_at, worth_threads
from pocktvm.schedule.rule import Emitted, Knobless, Task
from pocktvm.schedule.strided_copy import fill, move_lanes, moved_as
from pocktvm.tvm_api import T, tirx

Expr = Any
BLOCK = 64  # columns of one task


@dataclass(frozen=True)
class Table:
    """Shapes around the axis of a table."""

    outer: int
    length: int
    inner: int
    count: int  # indices
    mode: str

    def row(self, index: Expr) -> Expr:
        """An index inside the table."""
        last, zero = tirx.const(self.length - 1, "int32"), tirx.const(0, "int32")
        if self.mode == "wrap":
            return T.bind(tirx.FloorMod(index, tirx.const(self.length, "int32")))
        return T.bind(tirx.Max(tirx.Min(index, last), zero))


def describe_table(task: Task, table: str) -> Table:
    """The table of a task, and how many indices read it."""
    shape, attrs = task.shape(table), task.node.attrs
    axis = int(attrs.get("axis") or 0) % len(shape)
    count = task.values[index_input(task)].size
    outer, inner = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
    return Table(outer, shape[axis], inner, count, str(attrs.get("mode")))


def index_input(task: Task) -> str:
    """The input that names rows of the table."""
    return task.node.inputs[2 if task.node.op == "take_update" else 1]


def _decline(task: Task, op: str) -> str | None:
    node = task.node
    if node.op != op:
        return f"not {op}"
    if task.values[index_input(task)].dtype != "int32":
        return f"indices of {task.values[index_input(task)].dtype}"
    if any(task.values[n].size == 0 for n in (*node.inputs, *node.outputs)):
        return "an empty tensor"
    return None


class Take(Knobless):
    """y[o, i, :] = table[o, indices[i], :]."""

    name = "take"

    def decline(self, task: Task) -> str | None:
        """Declines groups and indices that are not int32."""
        return _decline(task, "take")

    def emit(self, task: Task, knobs: Mapping[str, Any]) -> Emitted:
        """One row copy an index."""
        node, isa = task.node, task.target.isa
        t = describe_table(task, node.inputs[0])
        dtype = moved_as(task.values[node.outputs[0]].dtype, isa)
        lanes = move_lanes(dtype, isa)

        def body(ctx: Context) -> None:
            table, y = ctx.buffers[node.inputs[0]], ctx.buffers[node.outputs[0]]
            parallel = worth_threads(isa, 8 * t.outer * t.count * t.inner)
            if t.inner == 1:  # chosen channels of every pixel
                for (o,) in grid((t.outer,), parallel):
                    with T.serial(0, t.count) as i:
                        row = t.row(ctx.load(node.inputs[1], i, 1))
                        value = load(table, o * t.length + row, 1)
                        store(y, o * t.count + i, value, 1)
                return
            for o, i in grid((t.outer, t.count), parallel):
                row = t.row(ctx.load(node.inputs[1], i, 1))
                source = T.bind((o * t.length + row) * t.inner)
                goal = T.bind((o * t.count + i) * t.inner)
                for c, w in vector_loop(t.inner, lanes, 2):
                    store(y, goal + c, load(table, source + c, w), w)

        bits = {name: dtype for name in (node.inputs[0], node.outputs[0])}
        return Emitted(build(task, body, dtypes=bits))


class TakeGrad(Knobless):
    """dtable[o, indices[i], :] += dy[o, i, :] from zeros; as an update, table[…] -= lr * dy."""

    name = "take_grad"

    def decline(self, task: Task) -> str | None:
        """Declines groups, indices that are not int32, gradients that are not float32."""
        reason = _decline(task, "take_update" if task.node.op == "take_update" else "take_grad")
        if reason is None and task.values[task.node.outputs[0]].dtype != "float32":
            return "not float32"
        return reason

    def emit(self, task: Task, knobs: Mapping[str, Any]) -> Emitted:
        """Zeros everywhere (a gradient), then rows in order, block of columns by block."""
        node, isa = task.node, task.target.isa
        update = node.op == "take_update"
        dy, indices = node.inputs[int(update)], index_input(task)
        t = describe_table(task, node.outputs[0])
        skipped = node.attrs.get("padding_idx", -1)
        skipped = -1 if skipped is None else int(skipped)
        block = min(t.inner, BLOCK)

        def body(ctx: Context) -> None:
            if not update:
                table = ctx.buffers[node.outputs[0]]
                fill(table, t.outer * t.length * t.inner, const(0.0), "float32", isa)
            factor = const(0.0) - ctx.load(node.inputs[3], 0, 1) if update else None
            parallel = worth_threads(isa, 8 * t.outer * t.count * t.inner)
            for o, b in grid((t.outer, ceil_div(t.inner, block)), parallel):
                for column, width in tile_at(b, t.inner, block):
                    with T.serial(0, t.count) as i:
                        row = t.row(ctx.load(indices, i, 1))
                        if skipped < 0:
                            add_row(ctx, o, i, row, (column, width), factor)
                            continue
                        with T.If(tirx.NE(row, tirx.const(skipped, "int32"))), T.Then():
                            add_row(ctx, o, i, row, (column, width), factor)

        def add_row(
            ctx: Context, o: Expr, i: Expr, row: Expr, columns: tuple[Expr, int], factor: Expr
        ) -> None:
            goal = T.bind((o * t.length + row) * t.inner + columns[0])
            source = T.bind((o * t.count + i) * t.inner + columns[0])
            for c, w in vector_loop(columns[1], isa.lanes, 4):
                added = ctx.load(dy, source + c, w)
                added = added if factor is None else added * splat(factor, w)
                total = ctx.load(node.outputs[0], goal + c, w) + added
                ctx.store(node.outputs[0], goal + c, total, w)

        return Emitted(build(task, body), inplace=((0, 0),) if update else ())
