"""What the rules of spatial operators (convolutions, pools, resizes) share."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from pocktvm.ir.graph import Node
from pocktvm.schedule.loops import worth_threads
from pocktvm.schedule.rule import Task
from pocktvm.schedule.special import grouped
from pocktvm.tvm_api import T


def outer(task: Task, extent: int, flops: float = 0, nbytes: float = 0) -> Any:
    """The outermost loop of a kernel: over threads when the work pays for them. A byte moved
    counts as four operations."""
    parallel = extent > 1 and worth_threads(task.target.isa, flops + 4 * nbytes)
    return (T.parallel if parallel else T.serial)(0, extent)


def decline_spatial(task: Task, *ops: str, inside: Collection[str] = ()) -> str | None:
    """Why a task is no NHWC float32 spatial operator of these names, with its epilogue; `inside`:
    operands that the rule computes itself."""
    node = task.anchor
    if node is None or node.op not in ops:
        return f"not {' or '.join(ops)}"
    if node.attrs.get("layout", "NCHW") != "NHWC":
        return f"layout {node.attrs.get('layout', 'NCHW')}; the layout pass makes it NHWC"
    names = (*node.inputs, *node.outputs)
    places = {"max_pool2d_indexed": node.outputs[1:], "max_pool2d_scatter": node.inputs[1:]}
    if any(task.values[n].dtype != "float32" for n in names if n not in places.get(node.op, ())):
        return "not float32"
    if any(name not in task.node.inputs for name in node.inputs if name not in inside):
        return "an operand is computed inside the group"
    shape = task.shape(node.outputs[0])
    if any(task.shape(out) != shape for out in task.node.outputs if out not in grouped(task)):
        return "an output of the group has another shape than the operator"
    if any(extent == 0 for name in names for extent in task.shape(name)):
        return "an empty tensor"
    return None


def anchor_of(task: Task) -> Node:
    """The operator that decides the loop nest; tasks without one were declined before."""
    node = task.anchor
    assert node is not None
    return node
