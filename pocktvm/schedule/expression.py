"""Evaluate the elementwise nodes of a group on vectors: epilogues, prologues, whole chains.

A position in a tensor of shape S is a `Position`: its flat index over S, the flat index `row`
over all axes but the last, and the index `column` on the last axis; a vector covers `width`
consecutive columns. Operands of a smaller (broadcast) shape find their element from it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pocktvm.errors import InternalError
from pocktvm.ir.graph import Node
from pocktvm.ir.ops import POSITIONAL
from pocktvm.schedule import bits, dropout
from pocktvm.schedule.elementwise_ops import OPS
from pocktvm.schedule.elementwise_ops.masking import passes
from pocktvm.schedule.emit import Context, const, splat
from pocktvm.schedule.rule import Task
from pocktvm.tvm_api import T, tirx

Expr = Any


@dataclass(frozen=True)
class Position:
    """Where a vector lies in a tensor of `shape`."""

    shape: tuple[int, ...]
    row: Expr
    column: Expr
    width: int

    @property
    def flat(self) -> Expr:
        """Index of the first lane over the whole tensor."""
        last = self.shape[-1] if self.shape else 1
        return self.row * last + self.column

    def coordinates(self) -> list[Expr]:
        """The index on every axis but the last (division and remainder by build-time extents)."""
        coordinates: list[Expr] = []
        rest = self.row
        for extent in reversed(self.shape[1:-1]):
            coordinates.append(rest % extent)
            rest = rest // extent
        if len(self.shape) > 1:
            coordinates.append(rest)
        return coordinates[::-1]


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


def broadcast_row(shape: Sequence[int], at: Position) -> Expr:
    """Flat index over all axes but the last of an operand of `shape`, right-aligned with `at`."""
    if len(shape) > len(at.shape):
        raise InternalError(f"operand {list(shape)} has more axes than the output {at.shape}")
    padded = (1,) * (len(at.shape) - len(shape)) + tuple(shape)
    if all(extent == 1 for extent in padded[:-1]):
        return tirx.const(0, "int32")
    if padded[:-1] == at.shape[:-1]:
        return at.row
    index: Expr = tirx.const(0, "int32")
    for extent, coordinate in zip(padded[:-1], at.coordinates(), strict=True):
        index = index * extent + (coordinate if extent > 1 else 0)
    return index


def known_op(op: str) -> bool:
    """True for what `evaluate` can emit."""
    return op in OPS or op in POSITIONAL


def flat_index(shape: Sequence[int], at: Position) -> Expr:
    """Row-major index of the first lane in a tensor of `shape` that broadcasts to the position's.
    Rules see views of a tensor's axes, never another order of them."""
    size = math.prod(shape)
    if size == math.prod(at.shape):
        return at.flat
    if size == 1:
        return tirx.const(0, "int32")
    if shape[-1] != at.shape[-1]:
        raise InternalError(f"a dropout of {list(shape)} inside loops over {list(at.shape)}")
    return broadcast_row(shape, at) * shape[-1] + at.column


def loop_shape(task: Task) -> tuple[int, ...]:
    """The shape of an elementwise group's loops: that of its nodes' results, or of what a lone
    pack_mask reads."""
    last = task.node.kernel_nodes()[-1]
    return task.shape((last.inputs if last.op == "pack_mask" else last.outputs)[0])


def masks(task: Task) -> set[str]:
    """Masks that a task reads or writes with several channels a byte."""
    nodes = [n for n in task.node.kernel_nodes() if n.attrs.get("group", 1) > 1]
    return {n.outputs[0] if n.op == "pack_mask" else n.inputs[1] for n in nodes}


def _packs_bits(node: Node) -> bool:
    return node.op == "pack_mask" and node.attrs["group"] > 1


def _drop(ctx: Context, node: Node, x: Expr, at: Position) -> Expr:
    index = flat_index(ctx.task.shape(node.outputs[0]), at)
    return dropout.drop(x, ctx.load(node.inputs[1], 0, 1), index, node.attrs, at.width)


def _apply_mask(ctx: Context, node: Node, dout: Expr, at: Position) -> Expr:
    """dout where its bit is set. Rows of the mask are those of the result, whose last axis is the
    loops', or a part of it that fills its bytes."""
    shape, group = ctx.task.shape(node.outputs[0]), node.attrs["group"]
    row = at.row if math.prod(shape) == math.prod(at.shape) else broadcast_row(shape, at)
    start = row * bits.row_bytes(at.shape[-1], group)
    truth = bits.read(ctx.buffers[node.inputs[1]], start, at.column, group, at.width)
    return tirx.Select(truth, dout, const(0.0, at.width))


def _write_mask(ctx: Context, node: Node, values: Mapping[str, Expr], at: Position) -> None:
    name, group, last = node.inputs[0], node.attrs["group"], at.shape[-1]
    y = values[name] if name in values else T.bind(load_operand(ctx, name, at))
    start = at.row * bits.row_bytes(last, group)
    truth = passes(y, node.attrs, at.width)
    bits.write(ctx.buffers[node.outputs[0]], start, at.column, last, group, truth, at.width)


# operators that depend on where an element lies: (context, node, first operand, position) -> vector
_SPECIAL = {"dropout": _drop, "apply_mask": _apply_mask}


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
        if _packs_bits(node):
            continue  # store_outputs writes it
        special = _SPECIAL.get(node.op) if node.attrs.get("group") != 1 else None
        operands = []
        for name in node.inputs[:1] if special else node.inputs:
            if name not in values:
                values[name] = load_operand(ctx, name, at)
            operands.append(values[name])
        dtype = ctx.task.values[node.outputs[0]].dtype
        if special:
            result = special(ctx, node, operands[0], at)
        else:
            result = OPS[node.op](operands, node.attrs, at.width, dtype)
        # TVM's analyzer cannot bind a vector of booleans to a name
        values[node.outputs[0]] = result if dtype == "bool" else T.bind(result)
    return values


def store_outputs(ctx: Context, values: dict[str, Expr], at: Position) -> None:
    """Write every output of the task that has been evaluated, and every mask."""
    for name in ctx.task.node.outputs:
        if name in values:
            ctx.store(name, at.flat, values[name], at.width)
    for node in ctx.task.node.kernel_nodes():
        if _packs_bits(node):
            _write_mask(ctx, node, values, at)


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
