"""Elementwise operators, and the activations that exporters spell out in several of them.

Spelt-out activations are put together again: one operator instead of four, and a gradient that
stays finite where the spelling overflows (softplus and elu of a large x).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pocktvm.autodiff.lowering.norm import match_rms_norm
from pocktvm.autodiff.lowering.registry import lower
from pocktvm.autodiff.ops import Emitter, Expr, dtype_of, plain, scalar_value

SAME = {
    f"relax.{name}": name
    for name in "negative exp log sqrt rsqrt abs sign tanh sigmoid erf sin cos floor ceil round "
    "square logical_not".split()
} | {f"relax.nn.{name}": name for name in "relu relu6 gelu gelu_tanh silu".split()}
TWO = {
    f"relax.{name}": name
    for name in "subtract maximum minimum equal not_equal less less_equal greater greater_equal "
    "logical_and logical_or floor_divide".split()
} | {"relax.mod": "mod", "relax.floor_mod": "mod"}

_LARGEST = 3.4028234e38


@lower(*SAME)
def unary(call: Any, args: Sequence[Expr], e: Emitter) -> Expr:
    """An operator of one operand whose name is ours too, without attributes."""
    return e.unary(SAME[call.op.name], args[0])


@lower(*TWO)
def binary(call: Any, args: Sequence[Expr], e: Emitter) -> Expr:
    """An operator of two operands; an integer beside a float becomes one."""
    return e.binary(TWO[call.op.name], *_same_dtype(args, e))


def _same_dtype(args: Sequence[Expr], e: Emitter) -> tuple[Expr, Expr]:
    a, b = args
    if dtype_of(a) != dtype_of(b) and "float32" in (dtype_of(a), dtype_of(b)):
        return e.astype(a, "float32"), e.astype(b, "float32")
    return a, b


@lower("relax.nn.dropout")
def dropout(call: Any, args: Sequence[Expr], e: Emitter) -> tuple[Expr, Expr]:
    """The identity but in a training step built with dropout. Its second result, a mask, is read
    by nobody."""
    y = e.dropout(args[0], float(call.attrs.rate))
    return y, y


@lower("relax.astype")
def astype(call: Any, args: Sequence[Expr], e: Emitter) -> Expr:
    """A cast; 64-bit types are narrowed."""
    return e.astype(args[0], str(call.attrs.dtype))


@lower("relax.where")
def where(call: Any, args: Sequence[Expr], e: Emitter) -> Expr:
    """softplus when it is where(beta*x > threshold, x, log(1 + exp(beta*x)) / beta), elu when it
    is where(x > 0, x, alpha * (exp(min(x, 0)) - 1))."""
    found = _softplus(args, e)
    found = _elu_of_where(args, e) if found is None else found
    return e.where(*args) if found is None else found


@lower("relax.nn.leakyrelu")
def leakyrelu(call: Any, args: Sequence[Expr], e: Emitter) -> Expr:
    """x where x > 0, else alpha*x."""
    return e.unary("leakyrelu", args[0], alpha=float(call.attrs.alpha))


@lower("relax.nn.prelu")
def prelu(call: Any, args: Sequence[Expr], e: Emitter) -> Expr:
    """relu(x) - slope * relu(-x), the slope broadcast along its axis."""
    x, slope = args
    rank, axis = len(x.ty.shape), int(call.attrs.axis) % len(x.ty.shape)
    size = int(slope.ty.shape[0])
    slope = e.reshape(slope, [size if i == axis else 1 for i in range(rank)])
    below = e.unary("relu", e.unary("negative", x))
    return e.subtract(e.unary("relu", x), e.multiply(slope, below))


@lower("relax.nn.softplus")
def softplus(call: Any, args: Sequence[Expr], e: Emitter) -> Expr:
    """log(1 + exp(beta*x)) / beta, or x above the threshold."""
    beta, threshold = float(call.attrs.beta), float(call.attrs.threshold)
    return e.unary("softplus", args[0], beta=beta, threshold=threshold)


@lower("relax.nn.selu")
def selu(call: Any, args: Sequence[Expr], e: Emitter) -> Expr:
    """scale * elu(x, alpha) with the constants of the paper (arXiv 1706.02515)."""
    return e.multiply(e.unary("elu", args[0], alpha=1.6732632423543772), 1.0507009873554805)


@lower("relax.clip")
def clip(call: Any, args: Sequence[Expr], e: Emitter) -> Expr:
    """relu, relu6, or min(max(x, lo), hi); two one-sided clips become one."""
    low, high = (_bound(float(plain(a))) for a in call.args[1:3])
    x, inner = args[0], e.call_of(args[0], "clip", "relu")
    if inner is not None:
        attrs = {"min": 0.0} if inner.op == "relu" else inner.attrs
        inner_low, inner_high = attrs.get("min", -math.inf), attrs.get("max", math.inf)
        if inner_low <= high and low <= inner_high:
            x, low, high = inner.args[0], max(low, inner_low), min(high, inner_high)
    return clipped(x, low, high, e)


def _bound(value: float) -> float:
    """A bound beyond float32, or at the end of the integers, is none."""
    unbounded = abs(value) >= _LARGEST or value in (-(2.0**31), 2.0**31 - 1, -(2.0**63), 2.0**63)
    return math.copysign(math.inf, value) if unbounded else value


def clipped(x: Expr, low: float, high: float, e: Emitter) -> Expr:
    """The operator for these bounds."""
    if (low, high) == (-math.inf, math.inf):
        return x
    if dtype_of(x) == "float32" and low == 0.0 and high in (6.0, math.inf):
        return e.unary("relu6" if high == 6.0 else "relu", x)
    if dtype_of(x) != "float32":
        low, high = (v if math.isinf(v) else int(v) for v in (low, high))
    bounds = {"min": None if math.isinf(low) else low, "max": None if math.isinf(high) else high}
    return e.unary("clip", x, **bounds)


@lower("relax.power")
def power(call: Any, args: Sequence[Expr], e: Emitter) -> Expr:
    """The common exponents have operators of their own, with gradients at 0."""
    x, exponent = _same_dtype(args, e)
    value = scalar_value(exponent)
    if value == 1.0:
        return x
    if value in (2.0, 0.5, -0.5, -1.0) and (dtype_of(x) == "float32" or value == 2.0):
        names = {2.0: "square", 0.5: "sqrt", -0.5: "rsqrt", -1.0: "reciprocal"}
        return e.unary(names[value], x)
    if value == 3.0:
        return e.multiply(e.unary("square", x), x)
    return e.binary("power", x, exponent)


@lower("relax.divide")
def divide(call: Any, args: Sequence[Expr], e: Emitter) -> Expr:
    """hardswish and hardsigmoid end in a division by 6; 1 / x is a reciprocal."""
    a, b = _same_dtype(args, e)
    if scalar_value(b) == 6.0:
        found = _hard(a, e)
        if found is not None:
            return found
    if scalar_value(b) == 1.0 and len(b.ty.shape) == 0:
        return a
    if scalar_value(a) == 1.0 and dtype_of(b) == "float32" and len(a.ty.shape) == 0:
        return e.unary("reciprocal", b)
    return e.divide(a, b)


@lower("relax.multiply")
def multiply(call: Any, args: Sequence[Expr], e: Emitter) -> Expr:
    """x * sigmoid(x) is silu, x * hardsigmoid(x) hardswish, x * rsqrt(…) * gamma rms_norm."""
    a, b = _same_dtype(args, e)
    norm = match_rms_norm(a, b, e)
    if norm is not None:
        return norm
    for x, other in ((a, b), (b, a)):
        gate = e.call_of(other, "sigmoid", "hardsigmoid")
        if gate is not None and gate.args[0].same_as(x):
            return e.unary("silu" if gate.op == "sigmoid" else "hardswish", x)
    return e.multiply(a, b)


@lower("relax.add")
def add(call: Any, args: Sequence[Expr], e: Emitter) -> Expr:
    """elu when it is relu(x) - alpha * relu(1 - exp(x))."""
    a, b = _same_dtype(args, e)
    found = _elu(a, b, e)
    found = _elu(b, a, e) if found is None else found
    return e.add(a, b) if found is None else found


def _hard(x: Expr, e: Emitter) -> Expr | None:
    """relu6(z + 3) (/6): hardsigmoid(z); z * relu6(z + 3) (/6): hardswish(z)."""
    gate = _plus_three(x, e)
    if gate is not None:
        return e.unary("hardsigmoid", gate)
    product = e.call_of(x, "multiply")
    if product is None:
        return None
    for z, other in (tuple(product.args), tuple(product.args)[::-1]):
        inner = _plus_three(other, e)
        if inner is not None and inner.same_as(z):
            return e.unary("hardswish", z)
    return None


def _plus_three(x: Expr, e: Emitter) -> Expr | None:
    """z when x is relu6(z + 3)."""
    relu6 = e.call_of(x, "relu6")
    total = relu6 and e.call_of(relu6.args[0], "add")
    if not total:
        return None
    z, three = total.args
    z, three = (three, z) if scalar_value(z) == 3.0 else (z, three)
    return z if scalar_value(three) == 3.0 else None


def _softplus(args: Sequence[Expr], e: Emitter) -> Expr | None:
    condition, x, other = args
    above = e.call_of(condition, "greater")
    threshold = scalar_value(above.args[1]) if above else None
    quotient = e.call_of(other, "divide")
    log = e.call_of(quotient.args[0] if quotient else other, "log")
    total = log and e.call_of(log.args[0], "add")
    if above is None or threshold is None or not total:
        return None
    exp = e.call_of(total.args[0], "exp") or e.call_of(total.args[1], "exp")
    one = scalar_value(total.args[1]) == 1.0 or scalar_value(total.args[0]) == 1.0
    beta = scalar_value(quotient.args[1]) if quotient else 1.0
    if not exp or not one or beta is None or not exp.args[0].same_as(above.args[0]):
        return None
    scaled = e.call_of(exp.args[0], "multiply")
    inner = exp.args[0] if beta == 1.0 or not scaled else _other(scaled, beta)
    if inner is None or not inner.same_as(x):
        return None
    return e.unary("softplus", x, beta=beta, threshold=threshold)


def _other(product: Any, factor: float) -> Expr | None:
    """The operand of a product whose other one is the constant `factor`."""
    a, b = product.args
    if scalar_value(b) == factor:
        return a
    return b if scalar_value(a) == factor else None


def _elu(a: Expr, b: Expr, e: Emitter) -> Expr | None:
    """elu when a is relu(x) and b is -alpha * relu(1 - exp(x))."""
    positive, product = e.call_of(a, "relu"), e.call_of(b, "multiply")
    if not positive or not product:
        return None
    factor = scalar_value(product.args[0])
    inner = e.call_of(product.args[1], "relu")
    difference = inner and e.call_of(inner.args[0], "subtract")
    if factor is None or not difference or scalar_value(difference.args[0]) != 1.0:
        return None
    exp = e.call_of(difference.args[1], "exp")
    if not exp or not exp.args[0].same_as(positive.args[0]):
        return None
    return e.unary("elu", positive.args[0], alpha=-factor)


def _elu_of_where(args: Sequence[Expr], e: Emitter) -> Expr | None:
    condition, x, curve = args
    above = e.call_of(condition, "greater")
    if not above or not above.args[0].same_as(x) or scalar_value(above.args[1]) != 0.0:
        return None
    product, alpha = e.call_of(curve, "multiply"), 1.0
    if product:
        found = scalar_value(product.args[1])
        if found is None:
            return None
        curve, alpha = product.args[0], found
    difference = e.call_of(curve, "subtract")
    if not difference or scalar_value(difference.args[1]) != 1.0:
        return None
    exp = e.call_of(difference.args[0], "exp")
    inner = exp and e.call_of(exp.args[0], "minimum")
    if not inner or not inner.args[0].same_as(x) or scalar_value(inner.args[1]) != 0.0:
        return None
    return e.unary("elu", x, alpha=alpha)
