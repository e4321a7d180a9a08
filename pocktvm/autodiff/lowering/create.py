"""Tensors made of nothing: constants, kept thin (a rank-0 value broadcast) where they can be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pocktvm.autodiff.lowering.registry import lower
from pocktvm.autodiff.ops import Emitter, Expr, constant, dtype_of, narrow, plain, shape_of


def _filled(value: Expr, shape: Sequence[int], dtype: str, e: Emitter) -> Expr:
    return e.broadcast_to(e.astype(value, dtype), shape)


@lower("relax.full")
def full(call: Any, args: Sequence[Expr], e: Emitter) -> Expr:
    """One value everywhere."""
    return _filled(_cast(args[1], call), plain(call.args[0]), _dtype(call), e)


@lower("relax.full_like")
def full_like(call: Any, args: Sequence[Expr], e: Emitter) -> Expr:
    """One value everywhere, in another tensor's shape."""
    return _filled(_cast(args[1], call), shape_of(args[0]), _dtype(call), e)


@lower("relax.zeros", "relax.ones", "relax.zeros_like", "relax.ones_like")
def zeros_or_ones(call: Any, args: Sequence[Expr], e: Emitter) -> Expr:
    """0 or 1 everywhere."""
    value = 1 if "ones" in call.op.name else 0
    return _filled(constant(value, _dtype(call)), shape_of(call), _dtype(call), e)


def _dtype(call: Any) -> str:
    return dtype_of(call)


def _cast(value: Expr, call: Any) -> Expr:
    return constant(value.value.numpy(), _dtype(call)) if hasattr(value, "value") else value


@lower("relax.arange")
def arange(call: Any, args: Sequence[Expr], e: Emitter) -> Expr:
    """range(start, end, step) as a constant: its bounds are known at build time."""
    start, end, step = (plain(a) for a in call.args[:3])
    return constant(np.arange(start, end, step), _dtype(call))


@lower("relax.eye")
def eye(call: Any, args: Sequence[Expr], e: Emitter) -> Expr:
    """The identity matrix."""
    rows, columns = shape_of(call)
    return constant(np.eye(rows, columns, int(plain(call.args[2]))), _dtype(call))


@lower("relax.triu", "relax.tril")
def triangle(call: Any, args: Sequence[Expr], e: Emitter) -> Expr:
    """x where the diagonal says so, else 0: a constant mask of the last two axes."""
    x = args[0]
    k = int(plain(call.args[1]))
    cut = np.triu if call.op.name.endswith("triu") else np.tril
    mask = cut(np.ones(shape_of(x)[-2:], dtype=bool), k)
    zero = constant(0, dtype_of(x))
    if dtype_of(x) == "bool":
        return e.binary("logical_and", x, constant(mask))
    return e.where(constant(mask), x, zero)


@lower("relax.one_hot")
def one_hot(call: Any, args: Sequence[Expr], e: Emitter) -> Expr:
    """on where the class is the index, else off."""
    indices, depth, axis = args[0], int(call.attrs.depth), int(call.attrs.axis)
    out = shape_of(call)
    axis %= len(out)
    classes = [depth if i == axis else 1 for i in range(len(out))]
    expanded = e.reshape(indices, [1 if i == axis else d for i, d in enumerate(out)])
    same = e.binary("equal", expanded, constant(np.arange(depth, dtype="int32").reshape(classes)))
    on, off = (constant(plain(a), narrow(_dtype(call))) for a in call.args[1:3])
    return e.where(same, on, off)
