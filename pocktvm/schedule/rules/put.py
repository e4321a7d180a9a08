"""Writing a slice of a tensor that learns in part into the tensor, where it lies.

The kernel touches the rows of the slice and nothing else: it is right only where its result takes
the place of the table, which schedule/program.py makes sure of.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pocktvm.schedule.emit import Context, build, load, store, vector_loop
from pocktvm.schedule.loops import grid, worth_threads
from pocktvm.schedule.rule import Emitted, Knobless, Task
from pocktvm.tvm_api import T


class Put(Knobless):
    """table[o, indices[i], :] = rows[o, i, :]."""

    name = "put"

    def decline(self, task: Task) -> str | None:
        """Declines anything but float32 rows at int32 indices."""
        node = task.node
        if node.op != "put":
            return "not put"
        if task.values[node.inputs[1]].dtype != "int32":
            return f"indices of {task.values[node.inputs[1]].dtype}"
        return None

    def emit(self, task: Task, knobs: Mapping[str, Any]) -> Emitted:
        """One row copy an index; indices are distinct, so rows are independent."""
        node, isa = task.node, task.target.isa
        _, indices, rows = node.inputs
        shape, axis = task.shape(node.outputs[0]), int(node.attrs["axis"])
        outer, inner = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
        count, length = task.values[indices].size, shape[axis]

        def body(ctx: Context) -> None:
            table, new = ctx.buffers[node.outputs[0]], ctx.buffers[rows]
            for (o,) in grid((outer,), worth_threads(isa, 8 * outer * count * inner)):
                with T.serial(0, count) as i:
                    goal = T.bind((o * length + ctx.load(indices, i, 1)) * inner)
                    source = T.bind((o * count + i) * inner)
                    for c, w in vector_loop(inner, isa.lanes, 2):
                        store(table, goal + c, load(new, source + c, w), w)

        return Emitted(build(task, body), inplace=((0, 0),))
