"""Operators that move elements: views, slices, padding, indexing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from pocktvm.ir.graph import Node, Value
from pocktvm.reference.registry import Tensor, reference


@reference("reshape")
def reshape(node: Node, args: Sequence[Tensor], outs: Sequence[Value]) -> Tensor:
    """x in the declared shape."""
    return args[0].reshape(outs[0].shape)


@reference("permute_dims")
def permute_dims(node: Node, args: Sequence[Tensor], outs: Sequence[Value]) -> Tensor:
    """Axis i of the result is axis axes[i] of x (all reversed when absent)."""
    axes = node.attrs.get("axes")
    return args[0].permute(tuple(reversed(range(args[0].ndim))) if axes is None else tuple(axes))


@reference("broadcast_to")
def broadcast_to(node: Node, args: Sequence[Tensor], outs: Sequence[Value]) -> Tensor:
    """x repeated to the declared shape."""
    return args[0].expand(outs[0].shape)


@reference("concat")
def concat(node: Node, args: Sequence[Tensor], outs: Sequence[Value]) -> Tensor:
    """Operands one after another along `axis`."""
    return torch.cat(tuple(args), dim=node.attrs.get("axis", 0))


def _picked(node: Node, shape: Sequence[int]) -> tuple[Tensor, ...]:
    """The index grid a strided slice reads."""
    rank = len(shape)
    strides = node.attrs.get("strides") or (1,) * rank
    bounds = zip(node.attrs["begin"], node.attrs["end"], strides, shape, strict=True)
    picked = [np.arange(n)[slice(b, e, s)] for b, e, s, n in bounds]
    return tuple(torch.from_numpy(i.copy()) for i in np.ix_(*picked))


@reference("strided_slice")
def strided_slice(node: Node, args: Sequence[Tensor], outs: Sequence[Value]) -> Tensor:
    """x[begin:end:strides] on every axis, with Python's meaning of the numbers."""
    return args[0][_picked(node, args[0].shape)]


@reference("strided_slice_grad")
def strided_slice_grad(node: Node, args: Sequence[Tensor], outs: Sequence[Value]) -> Tensor:
    """dy where the slice was, zeros elsewhere."""
    dx = torch.zeros(outs[0].shape, dtype=args[0].dtype)
    dx[_picked(node, dx.shape)] = args[0]
    return dx


@reference("pad")
def pad(node: Node, args: Sequence[Tensor], outs: Sequence[Value]) -> Tensor:
    """Widths are (before, after) per axis; negative ones crop."""
    x, widths = args[0], node.attrs["pad_width"]
    pairs = list(zip(widths[::2], widths[1::2], strict=True))
    mode = node.attrs.get("mode", "constant")
    if mode == "constant":
        flat = [w for pair in reversed(pairs) for w in pair]
        return torch.nn.functional.pad(x, flat, value=node.attrs.get("value", 0))
    for axis, (before, after) in enumerate(pairs):
        index = np.pad(np.arange(x.shape[axis]), (max(before, 0), max(after, 0)), mode=mode)
        index = index[max(-before, 0) : len(index) - max(-after, 0)]
        x = x.index_select(axis, torch.from_numpy(index))
    return x


def _indices(node: Node, indices: Tensor, length: int) -> Tensor:
    indices = indices.long()
    if node.attrs.get("mode") == "clip":
        return indices.clamp(0, length - 1)
    return torch.remainder(indices, length) if node.attrs.get("mode") == "wrap" else indices


def _axis(node: Node, rank: int) -> int:
    return int(node.attrs.get("axis") or 0) % rank


@reference("take")
def take(node: Node, args: Sequence[Tensor], outs: Sequence[Value]) -> Tensor:
    """Rows of `table` along `axis`."""
    table, indices = args
    axis = _axis(node, table.ndim)
    picked = table.index_select(axis, _indices(node, indices, table.shape[axis]).reshape(-1))
    return picked.reshape(*table.shape[:axis], *indices.shape, *table.shape[axis + 1 :])


@reference("put")
def put(node: Node, args: Sequence[Tensor], outs: Sequence[Value]) -> Tensor:
    """`table` with other rows at `indices` along `axis`."""
    table, indices, rows = args
    return table.index_copy(_axis(node, table.ndim), indices.long().reshape(-1), rows)


@reference("take_grad")
def take_grad(node: Node, args: Sequence[Tensor], outs: Sequence[Value]) -> Tensor:
    """dy's rows added into zeros; the row `padding_idx` gets none."""
    dy, indices = args
    shape = outs[0].shape
    axis = _axis(node, len(shape))
    flat = _indices(node, indices, shape[axis]).reshape(-1)
    rows = dy.reshape(*shape[:axis], flat.numel(), *shape[axis + 1 :])
    dtable = torch.zeros(shape, dtype=dy.dtype).index_add(axis, flat, rows)
    skipped = node.attrs.get("padding_idx", -1)
    if skipped is not None and skipped >= 0:
        dtable.select(axis, skipped).zero_()
    return dtable


@reference("take_update")
def take_update(node: Node, args: Sequence[Tensor], outs: Sequence[Value]) -> Tensor:
    """A step of plain SGD along take_grad."""
    table, dy, indices, lr = args
    return table - lr * take_grad(node, (dy, indices), outs)


@reference("gather_elements")
def gather_elements(node: Node, args: Sequence[Tensor], outs: Sequence[Value]) -> Tensor:
    """torch.gather."""
    return torch.gather(args[0], node.attrs.get("axis", 0), args[1].long())


@reference("scatter_add_elements")
def scatter_add_elements(node: Node, args: Sequence[Tensor], outs: Sequence[Value]) -> Tensor:
    """dy added into zeros at `indices`."""
    dx = torch.zeros(outs[0].shape, dtype=args[0].dtype)
    return dx.scatter_add(node.attrs.get("axis", 0), args[1].long(), args[0])
