"""Gradients of the activations, from what the rules of autodiff keep."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pocktvm.schedule import vector_math as vm
from pocktvm.schedule.elementwise_ops.activations import TANH_GELU, gelu_inner
from pocktvm.schedule.elementwise_ops.table import Expr, bound, op
from pocktvm.schedule.emit import const
from pocktvm.tvm_api import T, tirx


def masked(condition: Expr, value: Expr, width: int) -> Expr:
    """value where the condition holds, else 0."""
    return tirx.Select(condition, value, const(0.0, width))


@op("relu_grad")
def relu_grad(a: list[Expr], attrs: Mapping[str, Any], width: int, dtype: str) -> Expr:
    """dout where y > 0."""
    return masked(a[1] > const(0.0, width), a[0], width)


@op("relu6_grad")
def relu6_grad(a: list[Expr], attrs: Mapping[str, Any], width: int, dtype: str) -> Expr:
    """dout where 0 < y < 6."""
    y = T.bind(a[1])
    inner = masked(y > const(0.0, width), a[0], width)
    return masked(y < const(6.0, width), inner, width)


@op("clip_grad")
def clip_grad(a: list[Expr], attrs: Mapping[str, Any], width: int, dtype: str) -> Expr:
    """dout where min <= x <= max."""
    x, result = T.bind(a[1]), a[0]
    if (minimum := bound(attrs, "min")) is not None:
        result = masked(x >= const(minimum, width), result, width)
    if (maximum := bound(attrs, "max")) is not None:
        result = masked(x <= const(maximum, width), result, width)
    return result


@op("sigmoid_grad")
def sigmoid_grad(a: list[Expr], attrs: Mapping[str, Any], width: int, dtype: str) -> Expr:
    """dout y (1 - y)."""
    y = T.bind(a[1])
    return a[0] * y * (const(1.0, width) - y)


@op("tanh_grad")
def tanh_grad(a: list[Expr], attrs: Mapping[str, Any], width: int, dtype: str) -> Expr:
    """dout (1 - y y)."""
    y = T.bind(a[1])
    return a[0] * (const(1.0, width) - y * y)


@op("silu_grad")
def silu_grad(a: list[Expr], attrs: Mapping[str, Any], width: int, dtype: str) -> Expr:
    """dout s (1 + x (1 - s)), s = sigmoid(x)."""
    x = T.bind(a[1])
    s, one = vm.sigmoid(x, width), const(1.0, width)
    return a[0] * s * (one + x * (one - s))


@op("gelu_grad")
def gelu_grad(a: list[Expr], attrs: Mapping[str, Any], width: int, dtype: str) -> Expr:
    """dout (Phi(x) + x phi(x))."""
    x = T.bind(a[1])
    cdf = (vm.erf(x * const(math.sqrt(0.5), width), width) + const(1.0, width)) * const(0.5, width)
    pdf = vm.exp(x * x * const(-0.5, width), width) * const(1.0 / math.sqrt(2 * math.pi), width)
    return a[0] * (cdf + x * pdf)


@op("gelu_tanh_grad")
def gelu_tanh_grad(a: list[Expr], attrs: Mapping[str, Any], width: int, dtype: str) -> Expr:
    """The derivative of gelu_tanh."""
    x, one, half = T.bind(a[1]), const(1.0, width), const(0.5, width)
    t = gelu_inner(x, width)
    inner = (one + x * x * const(3 * 0.044715, width)) * const(TANH_GELU, width)
    return a[0] * (half * (one + t) + half * x * (one - t * t) * inner)


@op("softplus_grad")
def softplus_grad(a: list[Expr], attrs: Mapping[str, Any], width: int, dtype: str) -> Expr:
    """dout sigmoid(beta x); dout above the threshold."""
    bx = T.bind(a[1] * const(attrs.get("beta", 1.0), width))
    d = T.bind(a[0])
    return tirx.Select(
        bx > const(attrs.get("threshold", 20.0), width), d, d * vm.sigmoid(bx, width)
    )


@op("hardsigmoid_grad")
def hardsigmoid_grad(a: list[Expr], attrs: Mapping[str, Any], width: int, dtype: str) -> Expr:
    """dout / 6 where -3 < x < 3."""
    x = T.bind(a[1])
    inner = masked(x > const(-3.0, width), a[0] * const(1.0 / 6.0, width), width)
    return masked(x < const(3.0, width), inner, width)


@op("hardswish_grad")
def hardswish_grad(a: list[Expr], attrs: Mapping[str, Any], width: int, dtype: str) -> Expr:
    """0 below -3, dout above 3, dout (x/3 + 1/2) between."""
    x, d = T.bind(a[1]), T.bind(a[0])
    middle = d * (x * const(1.0 / 3.0, width) + const(0.5, width))
    upper = tirx.Select(x >= const(3.0, width), d, middle)
    return masked(x > const(-3.0, width), upper, width)


@op("leakyrelu_grad")
def leakyrelu_grad(a: list[Expr], attrs: Mapping[str, Any], width: int, dtype: str) -> Expr:
    """dout where x > 0, alpha dout elsewhere."""
    d = T.bind(a[0])
    return tirx.Select(a[1] > const(0.0, width), d, d * const(attrs["alpha"], width))


@op("elu_grad")
def elu_grad(a: list[Expr], attrs: Mapping[str, Any], width: int, dtype: str) -> Expr:
    """dout where x > 0, dout alpha e**x elsewhere."""
    x, d = T.bind(a[1]), T.bind(a[0])
    return tirx.Select(
        x > const(0.0, width), d, d * const(attrs["alpha"], width) * vm.exp(x, width)
    )
