"""Reductions and parts of tensors.

All parts become slices with plain bounds, so that slices can sink through rows (passes), and no
tuple or index tensor is left to differentiate.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from torch import fx

from pocktvm.frontend.converters.registry import (
    argument,
    const,
    converts,
    dtype_of,
    shape_of,
)
from pocktvm.frontend.exported import operator_name
from pocktvm.tvm_api import relax


def _axes(node: fx.Node) -> list[int] | None:
    axes = argument(node, 1, "dim")
    return [int(a) for a in axes] if isinstance(axes, list | tuple) and axes else None


@converts("amax.default")
def _amax(importer: Any, node: fx.Node) -> Any:
    x, keep = importer.env[node.args[0]], bool(argument(node, 2, "keepdim", False))
    return importer.block_builder.emit(relax.op.max(x, _axes(node), keep))


@converts("amin.default")
def _amin(importer: Any, node: fx.Node) -> Any:
    x, keep = importer.env[node.args[0]], bool(argument(node, 2, "keepdim", False))
    return importer.block_builder.emit(relax.op.min(x, _axes(node), keep))


@converts("prod.dim_int")
def _prod(importer: Any, node: fx.Node) -> Any:
    x, keep = importer.env[node.args[0]], bool(argument(node, 2, "keepdim", False))
    return importer.block_builder.emit(relax.op.prod(x, int(node.args[1]), keep))


@converts("max.dim", "min.dim")
def _extreme(importer: Any, node: fx.Node) -> Any:
    """(values, indices); what nobody reads is dropped afterwards."""
    x, emit = importer.env[node.args[0]], importer.block_builder.emit
    axis, keep = int(node.args[1]), bool(argument(node, 2, "keepdim", False))
    value, index = (
        (relax.op.max, relax.op.argmax)
        if operator_name(node) == "max.dim"
        else (relax.op.min, relax.op.argmin)
    )
    return (emit(value(x, axis, keep)), emit(index(x, axis, keep)))


@converts("var.correction")
def _var(importer: Any, node: fx.Node) -> Any:
    return _moments(importer, node)[0]


@converts("std.correction")
def _std(importer: Any, node: fx.Node) -> Any:
    return importer.block_builder.emit(relax.op.sqrt(_moments(importer, node)[0]))


@converts("var_mean.correction")
def _moments(importer: Any, node: fx.Node) -> Any:
    """(variance, mean); the variance as a sum of squares, which has a gradient."""
    x, emit = importer.env[node.args[0]], importer.block_builder.emit
    axes, keep = _axes(node), bool(node.kwargs.get("keepdim", False))
    shape = shape_of(x)
    count = int(np.prod([shape[a] for a in axes] if axes else shape))
    correction = node.kwargs.get("correction")
    correction = 1 if correction is None else correction
    centre = emit(relax.op.mean(x, axes, True))
    offset = emit(relax.op.subtract(x, centre))
    squares = emit(relax.op.sum(emit(relax.op.multiply(offset, offset)), axes, keep))
    spread = emit(relax.op.multiply(squares, const(1 / (count - correction), dtype_of(x))))
    return (spread, emit(relax.op.mean(x, axes, keep)))


def _slice(importer: Any, x: Any, axis: int, begin: int, end: int, step: int = 1) -> Any:
    return importer.block_builder.emit(
        relax.op.strided_slice(x, axes=[axis], begin=[begin], end=[end], strides=[step])
    )


def _pieces(importer: Any, x: Any, axis: int, sizes: list[int]) -> list[Any]:
    bounds = np.cumsum([0, *sizes]).tolist()
    return [_slice(importer, x, axis, begin, end) for begin, end in pairwise(bounds)]


def _without(importer: Any, x: Any, axis: int) -> Any:
    shape = shape_of(x)
    return importer.block_builder.emit(relax.op.reshape(x, shape[:axis] + shape[axis + 1 :]))


@converts("select.int")
def _select(importer: Any, node: fx.Node) -> Any:
    x, index = importer.env[node.args[0]], int(node.args[2])
    axis = int(node.args[1]) % len(shape_of(x))
    index %= shape_of(x)[axis]
    return _without(importer, _slice(importer, x, axis, index, index + 1), axis)


@converts("unbind.int")
def _unbind(importer: Any, node: fx.Node) -> Any:
    x = importer.env[node.args[0]]
    axis = int(argument(node, 1, "dim", 0)) % len(shape_of(x))
    pieces = _pieces(importer, x, axis, [1] * shape_of(x)[axis])
    return [_without(importer, piece, axis) for piece in pieces]


@converts("slice.Tensor")
def _slice_tensor(importer: Any, node: fx.Node) -> Any:
    x = importer.env[node.args[0]]
    axis = int(argument(node, 1, "dim", 0)) % len(shape_of(x))
    size = shape_of(x)[axis]
    bounds = slice(argument(node, 2, "start"), argument(node, 3, "end"), argument(node, 4, "step"))
    begin, end, step = bounds.indices(size)
    if (begin, end, step) == (0, size, 1):
        return x
    return _slice(importer, x, axis, begin, end, step)


@converts("split.Tensor", "split_with_sizes.default", "chunk.default")
def _split(importer: Any, node: fx.Node) -> Any:
    x = importer.env[node.args[0]]
    axis = int(argument(node, 2, "dim", 0)) % len(shape_of(x))
    sizes = [int(part.shape[axis]) for part in node.meta["val"]]
    return _pieces(importer, x, axis, sizes)


@converts("stack.default")
def _stack(importer: Any, node: fx.Node) -> Any:
    emit, parts = importer.block_builder.emit, [importer.env[part] for part in node.args[0]]
    shape = shape_of(parts[0])
    axis = int(argument(node, 1, "dim", 0)) % (len(shape) + 1)
    parts = [emit(relax.op.reshape(p, [*shape[:axis], 1, *shape[axis:]])) for p in parts]
    return emit(relax.op.concat(parts, axis))
