"""One vector expression per elementwise operator (vocabulary: pocktvm/ir/ops.py)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from pocktvm.schedule import vector_math as vm
from pocktvm.schedule.emit import const
from pocktvm.tvm_api import T, tirx

Expr = Any
Emit = Callable[[list[Expr], Mapping[str, Any], int, str], Expr]
OPS: dict[str, Emit] = {}


def op(*names: str) -> Callable[[Emit], Emit]:
    """Register the emitter of one or more operators: (operands, attrs, width, dtype) -> vector.

    `dtype` is that of the result."""

    def register(function: Emit) -> Emit:
        for name in names:
            OPS[name] = function
        return function

    return register


def _vector_call(function: Callable[..., Expr]) -> Emit:
    return lambda a, attrs, w, dtype: function(a[0], w)


def _libm_call(function: Callable[..., Expr]) -> Emit:
    return lambda a, attrs, w, dtype: vm.scalar_calls(function, a[0], w)


def _simple(name: str, function: Callable[..., Expr]) -> None:
    OPS[name] = lambda a, attrs, w, dtype: function(*a)


for _name, _function in {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "maximum": lambda a, b: tirx.Max(a, b),
    "minimum": lambda a, b: tirx.Min(a, b),
    "equal": lambda a, b: a.equal(b),
    "not_equal": lambda a, b: tirx.NE(a, b),
    "less": lambda a, b: tirx.LT(a, b),
    "less_equal": lambda a, b: tirx.LE(a, b),
    "greater": lambda a, b: tirx.GT(a, b),
    "greater_equal": lambda a, b: tirx.GE(a, b),
    "logical_and": lambda a, b: tirx.And(a, b),
    "logical_or": lambda a, b: tirx.Or(a, b),
    "where": lambda c, a, b: tirx.Select(c, a, b),
    "copy": lambda a: a,
    "floor": tirx.floor,
    "ceil": tirx.ceil,
    "round": tirx.nearbyint,
    "sqrt": tirx.sqrt,
}.items():
    _simple(_name, _function)


@op("divide")
def divide(a: list[Expr], attrs: Mapping[str, Any], width: int, dtype: str) -> Expr:
    """a / b (true division; floats)."""
    return tirx.Div(a[0], a[1])


@op("floor_divide")
def floor_divide(a: list[Expr], attrs: Mapping[str, Any], width: int, dtype: str) -> Expr:
    """floor(a / b)."""
    return tirx.FloorDiv(*a) if dtype.startswith("int") else tirx.floor(tirx.Div(*a))


@op("mod")
def mod(a: list[Expr], attrs: Mapping[str, Any], width: int, dtype: str) -> Expr:
    """The remainder with the divisor's sign, as torch.remainder."""
    if dtype.startswith("int"):
        return tirx.FloorMod(*a)
    x, y = T.bind(a[0]), T.bind(a[1])
    return x - tirx.floor(tirx.Div(x, y)) * y


@op("power")
def power(a: list[Expr], attrs: Mapping[str, Any], width: int, dtype: str) -> Expr:
    """a ** b; small constant exponents become products."""
    x, exponent = a
    value = _literal(exponent)
    if value is not None and value == int(value) and 1 <= value <= 4:
        x = T.bind(x)
        result = x
        for _ in range(int(value) - 1):
            result = result * x
        return result
    if value == 0.5:
        return tirx.sqrt(x)
    if value == -0.5:
        return const(1.0, width) / tirx.sqrt(x)
    if value == -1:
        return const(1.0, width) / x
    return _lanewise2(tirx.pow, x, exponent, width)


@op("negative")
def negative(a: list[Expr], attrs: Mapping[str, Any], width: int, dtype: str) -> Expr:
    """-x."""
    return const(0, width, dtype) - a[0]


@op("abs")
def absolute(a: list[Expr], attrs: Mapping[str, Any], width: int, dtype: str) -> Expr:
    """|x|."""
    x = T.bind(a[0])
    return tirx.Max(x, const(0, width, dtype) - x)


@op("sign")
def sign(a: list[Expr], attrs: Mapping[str, Any], width: int, dtype: str) -> Expr:
    """-1, 0 or 1."""
    x, zero, one = T.bind(a[0]), const(0, width, dtype), const(1, width, dtype)
    return tirx.Select(x > zero, one, tirx.Select(x < zero, zero - one, zero))


@op("square")
def square(a: list[Expr], attrs: Mapping[str, Any], width: int, dtype: str) -> Expr:
    """x * x."""
    x = T.bind(a[0])
    return x * x


@op("rsqrt")
def rsqrt(a: list[Expr], attrs: Mapping[str, Any], width: int, dtype: str) -> Expr:
    """1 / sqrt(x), exactly rounded steps."""
    return const(1.0, width) / tirx.sqrt(a[0])


@op("reciprocal")
def reciprocal(a: list[Expr], attrs: Mapping[str, Any], width: int, dtype: str) -> Expr:
    """1 / x."""
    return const(1.0, width) / a[0]


for _name, _vector in {
    "exp": vm.exp,
    "log": vm.log,
    "erf": vm.erf,
    "tanh": vm.tanh,
    "sigmoid": vm.sigmoid,
}.items():
    OPS[_name] = _vector_call(_vector)

for _name, _libm in {"sin": tirx.sin, "cos": tirx.cos}.items():
    OPS[_name] = _libm_call(_libm)


@op("logical_not")
def logical_not(a: list[Expr], attrs: Mapping[str, Any], width: int, dtype: str) -> Expr:
    """not x, of booleans."""
    return tirx.Not(a[0])


@op("astype")
def astype(a: list[Expr], attrs: Mapping[str, Any], width: int, dtype: str) -> Expr:
    """Conversion; to bool it is x != 0."""
    x = a[0]
    boolean = "bool" in _base(x)
    if dtype == "bool":
        return x if boolean else tirx.NE(x, const(0, width, _base(x)))
    if boolean:  # not a cast: TVM cannot bind a name to one of a vector of booleans
        return tirx.Select(x, const(1, width, dtype), const(0, width, dtype))
    return tirx.Cast(dtype if width == 1 else f"{dtype}x{width}", x)


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
    if (minimum := _bound(attrs, "min")) is not None:
        x = tirx.Max(x, const(minimum, width, dtype))
    if (maximum := _bound(attrs, "max")) is not None:
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


_TANH_GELU = math.sqrt(2.0 / math.pi)


def _gelu_inner(x: Expr, width: int) -> Expr:
    return vm.tanh((x + x * x * x * const(0.044715, width)) * const(_TANH_GELU, width), width)


@op("gelu_tanh")
def gelu_tanh(a: list[Expr], attrs: Mapping[str, Any], width: int, dtype: str) -> Expr:
    """GELU's tanh approximation."""
    x = T.bind(a[0])
    return x * const(0.5, width) * (const(1.0, width) + _gelu_inner(x, width))


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
    if (minimum := _bound(attrs, "min")) is not None:
        result = masked(x >= const(minimum, width), result, width)
    if (maximum := _bound(attrs, "max")) is not None:
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
    t = _gelu_inner(x, width)
    inner = (one + x * x * const(3 * 0.044715, width)) * const(_TANH_GELU, width)
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


def _bound(attrs: Mapping[str, Any], name: str) -> float | None:
    """A clip's bound; None where it is absent or infinite."""
    value = attrs.get(name)
    return None if value is None or not math.isfinite(value) else value


def _literal(x: Expr) -> float | None:
    inner = getattr(x, "value", None)
    if isinstance(inner, (int, float)):
        return float(inner)
    return _literal(inner) if inner is not None and inner is not x else None


def _lanewise2(function: Any, x: Expr, y: Expr, width: int) -> Expr:
    if width == 1:
        return function(x, y)
    x, y = T.bind(x), T.bind(y)
    lanes = [function(tirx.Shuffle([x], [i]), tirx.Shuffle([y], [i])) for i in range(width)]
    return tirx.Shuffle(lanes, list(range(width)))


def _base(x: Expr) -> str:
    dtype = str(x.ty.dtype) if hasattr(x, "ty") else str(x.dtype)
    return dtype.split("x")[0]
