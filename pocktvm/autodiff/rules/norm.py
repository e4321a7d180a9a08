"""Gradients of layer norm and RMS norm, from the statistics the forward kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pocktvm.autodiff.ops import Emitter, Expr, attrs_of, shape_of
from pocktvm.autodiff.rules.registry import gradient
from pocktvm.tvm_api import relax


def _item(value: Expr, index: int, name: str, e: Emitter) -> Expr:
    return e.bind(relax.TupleGetItem(value, index), name)


def _column(rows: Expr, x: Expr, e: Emitter) -> Expr:
    """A statistic per row, as it broadcasts over the row."""
    ones = (1,) * (len(shape_of(x)) - len(shape_of(rows)))
    return e.reshape(rows, (*shape_of(rows), *ones))


@gradient("layer_norm")
def layer_norm_grad(call: Any, out: Expr, dout: Expr, e: Emitter) -> Sequence[Any]:
    """dx: one operator over rows; dgamma = sum(dy * xhat), dbeta = sum(dy) over all rows.

    Shapes: x, dy S; gamma, beta the last axes of S; mean, rstd the others. Keeps x, mean, rstd.
    """
    x, gamma, beta = call.args
    dy = _item(dout, 0, "dy", e)
    mean, rstd = _item(out, 1, "mean", e), _item(out, 2, "rstd", e)

    def dx() -> Expr:
        return e.op(
            "layer_norm_grad", dy, x, gamma, mean, rstd, shape=shape_of(x), **attrs_of(call)
        )

    def dgamma() -> Expr:
        xhat = e.multiply(e.subtract(x, _column(mean, x, e)), _column(rstd, x, e))
        return e.sum_to(e.multiply(dy, xhat), shape_of(gamma))

    return [dx, dgamma, lambda: e.sum_to(dy, shape_of(beta))]


@gradient("rms_norm")
def rms_norm_grad(call: Any, out: Expr, dout: Expr, e: Emitter) -> Sequence[Any]:
    """dx: one operator over rows; dgamma = sum(dy * x * rstd). Keeps x and rstd."""
    x, gamma = call.args
    dy, rstd = _item(dout, 0, "dy", e), _item(out, 1, "rstd", e)

    def dx() -> Expr:
        return e.op("rms_norm_grad", dy, x, gamma, rstd, shape=shape_of(x), **attrs_of(call))

    def dgamma() -> Expr:
        xhat = e.multiply(x, _column(rstd, x, e))
        return e.sum_to(e.multiply(dy, xhat), shape_of(gamma))

    return [dx, dgamma]
