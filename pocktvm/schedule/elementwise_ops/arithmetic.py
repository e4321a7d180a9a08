"""Arithmetic, comparisons, conversions and functions of one number."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pocktvm.schedule import vector_math as vm
from pocktvm.schedule.elementwise_ops.table import OPS, Emit, Expr, op
from pocktvm.schedule.emit import const
from pocktvm.tvm_api import T, tirx


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
