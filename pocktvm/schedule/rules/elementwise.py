"""Chains of elementwise operators: one pass over memory, vectors along the last axis."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pocktvm.schedule.emit import Context, build, vector_loop
from pocktvm.schedule.expression import (
    Position,
    evaluate,
    known_op,
    loop_shape,
    store_outputs,
)
from pocktvm.schedule.rule import Emitted, Knob, Task
from pocktvm.schedule.special import grouped
from pocktvm.tvm_api import T, tirx

# One parallel region costs 5-12 us; below this many elements a second thread cannot pay for it.
SERIAL_ELEMENTS = 32768
BLOCK = 2048  # elements a thread takes at a time from a flat run: 8 KB an operand stays in L1


class Elementwise:
    """y[i] = f(a[i], b[i], …) over one common shape, operands broadcast."""

    name = "elementwise"

    def decline(self, task: Task) -> str | None:
        """Only groups without an anchor, and single elementwise nodes."""
        if task.node.body and task.anchor is not None:
            return f"the group is anchored by {task.anchor.op}"
        unknown = [n.op for n in task.node.kernel_nodes() if not known_op(n.op)]
        if unknown:
            return f"no vector expression for {', '.join(sorted(set(unknown)))}"
        shapes = {task.shape(o) for o in task.node.outputs if o not in grouped(task)}
        shapes.add(loop_shape(task))
        return None if len(shapes) == 1 else f"outputs of {len(shapes)} different shapes"

    def knobs(self, task: Task) -> Mapping[str, Knob]:
        """`unroll`: how many vectors an iteration of the loop computes."""
        return {"unroll": Knob((1, 2, 4), 2)}

    def emit(self, task: Task, knobs: Mapping[str, Any]) -> Emitted:
        """Flat blocks where no operand broadcasts, rows of the last axis elsewhere."""
        pairs = same_index_pairs(task)
        task = flatten(task)
        shape = loop_shape(task)
        columns = shape[-1]
        rows = math.prod(shape) // columns
        unroll, lanes = knobs["unroll"], _lanes(task)

        def piece(ctx: Context, row: Any, base: Any, extent: int) -> None:
            for start, width in vector_loop(extent, lanes, unroll):
                at = Position(shape, row, base + start, width)
                store_outputs(ctx, evaluate(ctx, task.node.kernel_nodes(), {}, at), at)

        def body(ctx: Context) -> None:
            loop = T.serial if rows * columns < SERIAL_ELEMENTS else T.parallel
            if rows > 1:
                with loop(0, rows) as r:
                    piece(ctx, r, tirx.const(0, "int32"), columns)
                return
            zero = tirx.const(0, "int32")
            blocks = columns // BLOCK
            if blocks > 1:
                with loop(0, blocks) as b:
                    piece(ctx, zero, b * BLOCK, BLOCK)
            done = blocks * BLOCK if blocks > 1 else 0
            if columns > done:
                piece(ctx, zero, tirx.const(done, "int32"), columns - done)

        return Emitted(build(task, body), inplace=pairs)


def _lanes(task: Task) -> int:
    """Integers alone may have wider vectors than floats; mixed chains have the floats'."""
    names = [n for node in task.node.kernel_nodes() for n in (*node.inputs, *node.outputs)]
    integers = {task.values[n].dtype for n in names} == {"int32"}
    return task.target.isa.integer_lanes if integers else task.target.isa.lanes


def flatten(task: Task) -> Task:
    """The same task over one axis when every operand is a scalar or of the outputs' shape, and
    masks have no padding."""
    shape, packed = loop_shape(task), grouped(task)
    names = [n for node in task.node.kernel_nodes() for n in (*node.inputs, *node.outputs)]
    if any(task.shape(n) != shape and task.values[n].size != 1 for n in names if n not in packed):
        return task
    groups = [node.attrs.get("group", 1) for node in task.node.kernel_nodes()]
    if any(group > 1 and shape[-1] % group for group in groups):
        return task
    values = {
        n: replace(v, shape=(math.prod(shape),)) if v.shape == shape else v
        for n, v in task.values.items()
    }
    return replace(task, values=values)


def same_index_pairs(task: Task) -> tuple[tuple[int, int], ...]:
    """Outputs that may overwrite an input: same shape and type, read and written at one index."""
    node, packed = task.node, grouped(task)  # a byte of a mask is not written at once
    types = {n: (task.shape(n), task.values[n].dtype) for n in (*node.inputs, *node.outputs)}
    return tuple(
        (o, i)
        for o, out in enumerate(node.outputs)
        for i, name in enumerate(node.inputs)
        if out not in packed and types[name] == types[out]
    )
