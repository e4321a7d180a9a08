"""Gradients of reductions, softmax and scans."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pocktvm.autodiff.ops import Emitter, Expr, attrs_of, op_name, shape_of
from pocktvm.autodiff.rules.registry import gradient


def _kept(x: Expr, value: Expr, axes: Sequence[int], e: Emitter) -> Expr:
    """A reduction's result with the reduced axes as ones."""
    return e.reshape(value, [1 if i in axes else d for i, d in enumerate(shape_of(x))])


@gradient("sum", "mean")
def sum_grad(call: Any, out: Expr, dout: Expr, e: Emitter) -> Sequence[Any]:
    """dout repeated over the reduced axes; a mean's is divided by their count first."""
    x, axes = call.args[0], attrs_of(call)["axes"]
    if op_name(call) == "mean":
        count = 1
        for axis in axes:
            count *= shape_of(x)[axis]
        dout = e.multiply(dout, 1.0 / count)
    return [e.broadcast_to(_kept(x, dout, axes, e), shape_of(x))]


@gradient("max", "min")
def max_grad(call: Any, out: Expr, dout: Expr, e: Emitter) -> Sequence[Any]:
    """dout to the extreme element; several equal ones share it evenly, as torch's amax does."""
    x, axes = call.args[0], attrs_of(call)["axes"]
    hit = e.astype(e.binary("equal", x, _kept(x, out, axes, e)), "float32")
    count = e.reduce("sum", hit, axes, keepdims=True)
    return [e.multiply(hit, e.divide(_kept(x, dout, axes, e), count))]


@gradient("prod")
def prod_grad(call: Any, out: Expr, dout: Expr, e: Emitter) -> Sequence[Any]:
    """dx = dout * y / x (x without zeros)."""
    x, axes = call.args[0], attrs_of(call)["axes"]
    product = _kept(x, e.multiply(dout, out), axes, e)
    return [e.divide(product, x)]


@gradient("cumsum")
def cumsum_grad(call: Any, out: Expr, dout: Expr, e: Emitter) -> Sequence[Any]:
    """The same scan from the other end."""
    attrs = attrs_of(call)
    return [e.unary("cumsum", dout, **{**attrs, "reverse": not attrs["reverse"]})]


@gradient("softmax", "log_softmax")
def softmax_grad(call: Any, out: Expr, dout: Expr, e: Emitter) -> Sequence[Any]:
    """softmax: dx = y * (dout - sum(dout*y)); log_softmax: dx = dout - exp(y) * sum(dout).
    Keeps the output."""
    attrs = attrs_of(call)
    return [e.op(f"{op_name(call)}_grad", dout, out, shape=shape_of(out), **attrs)]
