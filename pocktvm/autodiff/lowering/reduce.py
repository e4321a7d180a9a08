"""Reductions, softmax, scans."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from pocktvm.autodiff.lowering.registry import axes_of, lower
from pocktvm.autodiff.ops import Emitter, Expr, dtype_of, plain, shape_of


@lower("relax.sum", "relax.mean", "relax.max", "relax.min", "relax.prod")
def reduction(call: Any, args: Sequence[Expr], e: Emitter) -> Expr:
    """Over the named axes, or all."""
    x = args[0]
    axes = axes_of(plain(call.attrs.axis), len(shape_of(x)))
    name = call.op.name.removeprefix("relax.")
    return e.reduce(name, x, axes, bool(call.attrs.keepdims))


@lower("relax.variance", "relax.std")
def variance(call: Any, args: Sequence[Expr], e: Emitter) -> Expr:
    """mean((x - mean(x))²), its root for std."""
    x = args[0]
    axes = axes_of(plain(call.attrs.axis), len(shape_of(x)))
    centred = e.subtract(x, e.reduce("mean", x, axes, keepdims=True))
    var = e.reduce("mean", e.unary("square", centred), axes, bool(call.attrs.keepdims))
    return e.unary("sqrt", var) if call.op.name.endswith("std") else var


@lower("relax.nn.softmax", "relax.nn.log_softmax")
def softmax(call: Any, args: Sequence[Expr], e: Emitter) -> Expr:
    """softmax or log_softmax along one axis."""
    axis = int(call.attrs.axis) % len(shape_of(args[0]))
    return e.unary(call.op.name.removeprefix("relax.nn."), args[0], axis=axis)


@lower("relax.argmax")
def argmax(call: Any, args: Sequence[Expr], e: Emitter) -> Expr:
    """The first maximum's index; over all elements when no axis is named."""
    axis, keep = plain(call.attrs.axis), bool(call.attrs.keepdims)
    x = args[0] if axis is not None else e.reshape(args[0], [prod(shape_of(args[0]))])
    axis = (axis or 0) % len(shape_of(x))
    out = [1 if i == axis else d for i, d in enumerate(shape_of(x))]
    y = e.op("argmax", x, shape=tuple(out), dtype="int32", axis=axis, keepdims=True)
    return y if keep and shape_of(call) == tuple(out) else e.reshape(y, shape_of(call))


@lower("relax.cumsum")
def cumsum(call: Any, args: Sequence[Expr], e: Emitter) -> Expr:
    """Running sums; a bool counts, so it becomes an integer first."""
    x, axis = args[0], plain(call.attrs.axis)
    if dtype_of(x) == "bool":
        x = e.astype(x, "int32")
    x = x if axis is not None else e.reshape(x, [prod(shape_of(x))])
    attrs = {"axis": (axis or 0) % len(shape_of(x)), "reverse": False}
    attrs["exclusive"] = bool(plain(call.attrs.exclusive))
    return e.unary("cumsum", x, **attrs)
