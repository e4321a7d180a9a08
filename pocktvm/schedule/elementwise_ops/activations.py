"""Activations, forward."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pocktvm.schedule import vector_math as vm
from pocktvm.schedule.elementwise_ops.table import Expr, bound, op
from pocktvm.schedule.emit import const
from pocktvm.tvm_api import T, tirx


@op("relu")
def relu(a: list[Expr], attrs: Mapping[str, Any], width: int, dtype: str) -> Expr:
    """max(x, 0)."""
    return tirx.Max(a[0], const(0, width, dtype))


@op("relu6")
def relu6(a: list[Expr], attrs: Mapping[str, Any], width: int, dtype: str) -> Expr:
    """min(max(x, 0), 6)."""
    return tirx.Max(tirx.Min(a[0], const(6.0, width)), const(0.0, width))


@op("clip")
def clip(a: list[Expr], attrs: Mapping[str, Any], width: int, dtype: str) -> Expr:
    """min(max(x, attrs.min), attrs.max); infinite bounds are left out."""
    x = a[0]
    if (minimum := bound(attrs, "min")) is not None:
        x = tirx.Max(x, const(minimum, width, dtype))
    if (maximum := bound(attrs, "max")) is not None:
        x = tirx.Min(x, const(maximum, width, dtype))
    return x


@op("leakyrelu")
def leakyrelu(a: list[Expr], attrs: Mapping[str, Any], width: int, dtype: str) -> Expr:
    """x if x > 0 else alpha x."""
    x = T.bind(a[0])
    return tirx.Select(x > const(0.0, width), x, x * const(attrs["alpha"], width))


@op("elu")
def elu(a: list[Expr], attrs: Mapping[str, Any], width: int, dtype: str) -> Expr:
    """x if x > 0 else alpha (e**x - 1)."""
    x, alpha = T.bind(a[0]), const(attrs["alpha"], width)
    return tirx.Select(x > const(0.0, width), x, alpha * (vm.exp(x, width) - const(1.0, width)))


@op("silu")
def silu(a: list[Expr], attrs: Mapping[str, Any], width: int, dtype: str) -> Expr:
    """x sigmoid(x)."""
    x = T.bind(a[0])
    return x * vm.sigmoid(x, width)


@op("softplus")
def softplus(a: list[Expr], attrs: Mapping[str, Any], width: int, dtype: str) -> Expr:
    """log(1 + e**(beta x)) / beta; x itself above the threshold, as torch."""
    x = T.bind(a[0])
    beta = attrs.get("beta", 1.0)
    bx = T.bind(x * const(beta, width))
    soft = vm.log(const(1.0, width) + vm.exp(bx, width), width) * const(1.0 / beta, width)
    return tirx.Select(bx > const(attrs.get("threshold", 20.0), width), x, soft)


@op("hardsigmoid")
def hardsigmoid(a: list[Expr], attrs: Mapping[str, Any], width: int, dtype: str) -> Expr:
    """relu6(x + 3) / 6."""
    x = a[0] + const(3.0, width)
    clipped = tirx.Max(tirx.Min(x, const(6.0, width)), const(0.0, width))
    return clipped * const(1.0 / 6.0, width)


@op("hardswish")
def hardswish(a: list[Expr], attrs: Mapping[str, Any], width: int, dtype: str) -> Expr:
    """x hardsigmoid(x)."""
    x = T.bind(a[0])
    return x * hardsigmoid([x], attrs, width, dtype)


@op("gelu")
def gelu(a: list[Expr], attrs: Mapping[str, Any], width: int, dtype: str) -> Expr:
    """x Phi(x), by erf."""
    x = T.bind(a[0])
    cdf = vm.erf(x * const(math.sqrt(0.5), width), width) + const(1.0, width)
    return x * const(0.5, width) * cdf


TANH_GELU = math.sqrt(2.0 / math.pi)


def gelu_inner(x: Expr, width: int) -> Expr:
    """tanh(sqrt(2 / pi) (x + 0.044715 x**3)), which the gradient needs again."""
    return vm.tanh((x + x * x * x * const(0.044715, width)) * const(TANH_GELU, width), width)


@op("gelu_tanh")
def gelu_tanh(a: list[Expr], attrs: Mapping[str, Any], width: int, dtype: str) -> Expr:
    """GELU's tanh approximation."""
    x = T.bind(a[0])
    return x * const(0.5, width) * (const(1.0, width) + gelu_inner(x, width))
