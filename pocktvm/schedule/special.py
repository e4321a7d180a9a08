"""Operators whose result depends on where an element lies: what dropout drops, bits of masks, and
exponents of blocks. `expression.evaluate` calls them with the first operand in registers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from pocktvm.errors import InternalError
from pocktvm.ir.graph import Node
from pocktvm.schedule import bits, blocks, dropout
from pocktvm.schedule.elementwise_ops.masking import passes
from pocktvm.schedule.emit import Context, const
from pocktvm.schedule.position import Position, broadcast_row, flat_index
from pocktvm.schedule.rule import Task
from pocktvm.tvm_api import T, tirx

Expr = Any
Special = Callable[[Context, Node, Expr, Position], "Expr | None"]


def special(node: Node) -> Special | None:
    """How to emit such an operator: the result's vector, or None where all is written already."""
    return None if node.attrs.get("group") == 1 else _SPECIAL.get(node.op)


def grouped(task: Task) -> set[str]:
    """Values that a task reads or writes whose last axis counts bytes of several channels."""
    nodes = [n for n in task.node.kernel_nodes() if n.attrs.get("group", 1) > 1]
    return {(n.outputs[-1] if n.op.startswith("pack") else n.inputs[-1]) for n in nodes}


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


def _group(ctx: Context, node: Node) -> int:
    """Channels that share a byte; the graph was made for this target if a vector holds them."""
    group = int(node.attrs["group"])
    if group > ctx.lanes:
        raise InternalError(f"{node}: {group} channels a byte, {ctx.lanes} in a vector")
    return group


def _pack_mask(ctx: Context, node: Node, y: Expr, at: Position) -> None:
    group, last = _group(ctx, node), at.shape[-1]
    start = at.row * bits.row_bytes(last, group)
    truth = passes(T.bind(y), node.attrs, at.width)
    bits.write(ctx.buffers[node.outputs[0]], start, at.column, last, group, truth, at.width)


def _pack_i8(ctx: Context, node: Node, x: Expr, at: Position) -> Expr:
    group, last = _group(ctx, node), at.shape[-1]
    codes, exponent = blocks.quantize(T.bind(x), at.width)
    start = at.row * blocks.row_blocks(last, group)
    buffer = ctx.buffers[node.outputs[1]]
    blocks.write(buffer, start, at.column, last, group, exponent, at.width)
    return codes


def _unpack_i8(ctx: Context, node: Node, codes: Expr, at: Position) -> Expr:
    group, last = node.attrs["group"], at.shape[-1]
    if math.prod(ctx.task.shape(node.outputs[0])) != math.prod(at.shape):
        raise InternalError(f"blocks of {node} inside larger loops over {list(at.shape)}")
    start = at.row * blocks.row_blocks(last, group)
    buffer = ctx.buffers[node.inputs[1]]
    exponent = blocks.read(buffer, start, at.column, last, group, at.width)
    return blocks.restore(codes, exponent, at.width)


_SPECIAL: dict[str, Special] = {
    "dropout": _drop,
    "apply_mask": _apply_mask,
    "pack_mask": _pack_mask,
    "pack_i8": _pack_i8,
    "unpack_i8": _unpack_i8,
}
