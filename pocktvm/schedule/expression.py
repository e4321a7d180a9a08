"""Evaluate the elementwise nodes of a group on vectors: epilogues, prologues, whole chains.

Operands of a smaller (broadcast) shape find their element from the vector's position
(schedule/position.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pocktvm.errors import InternalError
from pocktvm.ir.graph import Node
from pocktvm.ir.ops import GROUPED, POSITIONAL
from pocktvm.schedule.elementwise_ops import OPS
from pocktvm.schedule.emit import Context, const, splat
from pocktvm.schedule.position import Position, broadcast_row
from pocktvm.schedule.rule import Task
from pocktvm.schedule.special import special
from pocktvm.tvm_api import T

__all__ = [
    "Position",
    "broadcast_row",
    "evaluate",
    "finish",
    "known_op",
    "load_operand",
    "loop_shape",
    "store_outputs",
]

Expr = Any


def load_operand(ctx: Context, name: str, at: Position) -> Expr:
    """The operand's elements under `at`, broadcast as numpy does."""
    task = ctx.task
    if name in task.literals:
        return const(task.literals[name], at.width, task.values[name].dtype)
    shape = task.shape(name)
    if shape == at.shape:
        return ctx.load(name, at.flat, at.width)
    if task.values[name].size == 1:
        return splat(ctx.load(name, 0, 1), at.width)
    index = broadcast_row(shape, at)
    if shape[-1] == 1:
        return splat(ctx.load(name, index, 1), at.width)
    return ctx.load(name, index * shape[-1] + at.column, at.width)


def known_op(op: str) -> bool:
    """True for what `evaluate` can emit."""
    return op in OPS or op in POSITIONAL or op in GROUPED


def loop_shape(task: Task) -> tuple[int, ...]:
    """The shape of an elementwise group's loops: that of its nodes' results, or of what a lone
    pack_mask reads."""
    last = task.node.kernel_nodes()[-1]
    return task.shape((last.inputs if last.op == "pack_mask" else last.outputs)[0])


def evaluate(
    ctx: Context, nodes: Sequence[Node], known: dict[str, Expr], at: Position
) -> dict[str, Expr]:
    """Emit the expressions of elementwise `nodes` at a position; returns every value by name.

    `known` holds what is already in registers (an anchor's accumulator); other operands are loaded
    when first needed. A node whose own shape is smaller than `at` is evaluated broadcast.
    """
    values = dict(known)
    for node in nodes:
        if not known_op(node.op):
            raise InternalError(f"no vector expression for '{node.op}'")
        emit = special(node)
        operands = []
        for name in node.inputs[:1] if emit else node.inputs:
            if name not in values:
                values[name] = load_operand(ctx, name, at)
            operands.append(values[name])
        dtype = ctx.task.values[node.outputs[0]].dtype
        if emit is None:
            result = OPS[node.op](operands, node.attrs, at.width, dtype)
        elif (result := emit(ctx, node, operands[0], at)) is None:
            continue
        # TVM's analyzer cannot bind a vector of booleans to a name
        values[node.outputs[0]] = result if dtype == "bool" else T.bind(result)
    return values


def store_outputs(ctx: Context, values: dict[str, Expr], at: Position) -> None:
    """Write every output of the task that has been evaluated."""
    for name in ctx.task.node.outputs:
        if name in values:
            ctx.store(name, at.flat, values[name], at.width)


def finish(ctx: Context, accumulators: dict[str, Expr], at: Position) -> None:
    """An anchor's epilogue: evaluate what follows the anchor in the group, write all outputs.

    `accumulators` maps the anchor's output names to vectors at `at`; the position's shape is the
    anchor's output shape.
    """
    node = ctx.task.node
    following: Sequence[Node] = ()
    if node.body:
        following = node.body[node.attrs["anchor"] + 1 :]
    store_outputs(ctx, evaluate(ctx, following, accumulators, at), at)
