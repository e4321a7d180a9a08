"""Which outputs of a group may take the memory of which inputs.

An epilogue reads its operands at the index it then writes, so an update `w - lr * dw` may be
written over `w`, a residual sum over the residual. An operand the anchor (or its prologue) reads
may not: other elements of the output still need it.
"""

from __future__ import annotations

from pocktvm.schedule.rule import Task
from pocktvm.schedule.special import grouped


def inplace_pairs(task: Task) -> tuple[tuple[int, int], ...]:
    """(output index, input index) pairs that may share memory: the input is read by epilogue
    nodes only and has exactly the output's shape and type."""
    node = task.node
    anchor = node.attrs.get("anchor") if node.body else 0
    before = () if anchor is None else (node.body or (node,))[: anchor + 1]
    blocked = {name for part in before for name in part.inputs}
    blocked |= grouped(task)  # a byte of a mask is not written at once
    pairs = []
    for o, output in enumerate(node.outputs):
        value = task.values[output]
        for i, name in enumerate(node.inputs):
            other = task.values[name]
            same = other.shape == value.shape and other.dtype == value.dtype
            if same and name not in blocked and node.inputs.count(name) == 1:
                pairs.append((o, i))
    return tuple(pairs)
