"""Gradients of operators of one element.

Where the gradient can be told from the output, the output is kept: it is alive anyway, as the next
operator's input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from pocktvm.autodiff.ops import Emitter, Expr, attrs_of, dtype_of, op_name, scalar_value, shape_of
from pocktvm.autodiff.rules.registry import gradient


@gradient("relu", "relu6", "sigmoid", "tanh")
def from_output_grad(call: Any, out: Expr, dout: Expr, e: Emitter) -> Sequence[Any]:
    """relu, relu6: dout where the output lies inside its bounds; sigmoid: dout*y*(1-y);
    tanh: dout*(1-y²). Keeps the output."""
    return [e.op(f"{op_name(call)}_grad", dout, out, shape=shape_of(out))]


@gradient("dropout")
def dropout_grad(call: Any, out: Expr, dout: Expr, e: Emitter) -> Sequence[Any]:
    """The same dropout of dout: the mask is made again from its key, nothing is kept."""
    return [e.op("dropout", dout, shape=shape_of(out), **attrs_of(call))]


@gradient(
    "clip",
    "gelu",
    "gelu_tanh",
    "silu",
    "softplus",
    "hardswish",
    "hardsigmoid",
    "leakyrelu",
    "elu",
)
def from_input_grad(call: Any, out: Expr, dout: Expr, e: Emitter) -> Sequence[Any]:
    """dout * f'(x), one operator each; at clip's bounds the gradient passes, as torch's clamp.
    Keeps the input."""
    x = call.args[0]
    return [e.op(f"{op_name(call)}_grad", dout, x, shape=shape_of(out), **attrs_of(call))]


@gradient("negative")
def negative_grad(call: Any, out: Expr, dout: Expr, e: Emitter) -> Sequence[Any]:
    """dx = -dout."""
    return [e.unary("negative", dout)]


@gradient("exp")
def exp_grad(call: Any, out: Expr, dout: Expr, e: Emitter) -> Sequence[Any]:
    """dx = dout * y."""
    return [e.multiply(dout, out)]


@gradient("log")
def log_grad(call: Any, out: Expr, dout: Expr, e: Emitter) -> Sequence[Any]:
    """dx = dout / x."""
    return [e.divide(dout, call.args[0])]


@gradient("sqrt")
def sqrt_grad(call: Any, out: Expr, dout: Expr, e: Emitter) -> Sequence[Any]:
    """dx = dout / (2 y)."""
    return [e.divide(dout, e.multiply(out, 2.0))]


@gradient("rsqrt")
def rsqrt_grad(call: Any, out: Expr, dout: Expr, e: Emitter) -> Sequence[Any]:
    """dx = -dout * y³ / 2."""
    cube = e.multiply(e.unary("square", out), out)
    return [e.multiply(dout, e.multiply(cube, -0.5))]


@gradient("reciprocal")
def reciprocal_grad(call: Any, out: Expr, dout: Expr, e: Emitter) -> Sequence[Any]:
    """dx = -dout * y²."""
    return [e.unary("negative", e.multiply(dout, e.unary("square", out)))]


@gradient("square")
def square_grad(call: Any, out: Expr, dout: Expr, e: Emitter) -> Sequence[Any]:
    """dx = 2 x dout."""
    return [e.multiply(dout, e.multiply(call.args[0], 2.0))]


@gradient("abs")
def abs_grad(call: Any, out: Expr, dout: Expr, e: Emitter) -> Sequence[Any]:
    """dx = dout * sign(x), 0 at 0."""
    return [e.multiply(dout, e.unary("sign", call.args[0]))]


@gradient("erf")
def erf_grad(call: Any, out: Expr, dout: Expr, e: Emitter) -> Sequence[Any]:
    """dx = dout * 2/sqrt(pi) * exp(-x²)."""
    bell = e.unary("exp", e.unary("negative", e.unary("square", call.args[0])))
    return [e.multiply(dout, e.multiply(bell, 2.0 / math.sqrt(math.pi)))]


@gradient("sin")
def sin_grad(call: Any, out: Expr, dout: Expr, e: Emitter) -> Sequence[Any]:
    """dx = dout * cos(x)."""
    return [e.multiply(dout, e.unary("cos", call.args[0]))]


@gradient("cos")
def cos_grad(call: Any, out: Expr, dout: Expr, e: Emitter) -> Sequence[Any]:
    """dx = -dout * sin(x)."""
    return [e.unary("negative", e.multiply(dout, e.unary("sin", call.args[0])))]


@gradient("relax.tan")
def tan_grad(call: Any, out: Expr, dout: Expr, e: Emitter) -> Sequence[Any]:
    """dx = dout * (1 + y²)."""
    return [e.multiply(dout, e.add(e.unary("square", out), 1.0))]


@gradient("relax.atan")
def atan_grad(call: Any, out: Expr, dout: Expr, e: Emitter) -> Sequence[Any]:
    """dx = dout / (1 + x²)."""
    return [e.divide(dout, e.add(e.unary("square", call.args[0]), 1.0))]


@gradient("sign", "floor", "ceil", "round")
def flat_grad(call: Any, out: Expr, dout: Expr, e: Emitter) -> Sequence[Any]:
    """Zero wherever it is defined."""
    return [e.multiply(dout, 0.0)]


@gradient("copy")
def copy_grad(call: Any, out: Expr, dout: Expr, e: Emitter) -> Sequence[Any]:
    """dx = dout."""
    return [dout]


@gradient("astype")
def astype_grad(call: Any, out: Expr, dout: Expr, e: Emitter) -> Sequence[Any]:
    """dout in x's dtype."""
    return [e.astype(dout, dtype_of(call.args[0]))]


def _both(
    call: Any, e: Emitter, da: Callable[[], Expr], db: Callable[[], Expr]
) -> Sequence[Callable[[], Expr]]:
    """Partials of a broadcasting operator, summed to each operand's shape."""
    a, b = call.args
    return [lambda: e.sum_to(da(), shape_of(a)), lambda: e.sum_to(db(), shape_of(b))]


@gradient("add")
def add_grad(call: Any, out: Expr, dout: Expr, e: Emitter) -> Sequence[Any]:
    """da = db = dout, summed over what was broadcast."""
    return _both(call, e, lambda: dout, lambda: dout)


@gradient("subtract")
def subtract_grad(call: Any, out: Expr, dout: Expr, e: Emitter) -> Sequence[Any]:
    """da = dout, db = -dout (negated after the sum, where it is smaller)."""
    a, b = call.args
    return [
        lambda: e.sum_to(dout, shape_of(a)),
        lambda: e.unary("negative", e.sum_to(dout, shape_of(b))),
    ]


@gradient("multiply")
def multiply_grad(call: Any, out: Expr, dout: Expr, e: Emitter) -> Sequence[Any]:
    """da = dout * b, db = dout * a."""
    a, b = call.args
    return _both(call, e, lambda: e.multiply(dout, b), lambda: e.multiply(dout, a))


@gradient("divide")
def divide_grad(call: Any, out: Expr, dout: Expr, e: Emitter) -> Sequence[Any]:
    """da = dout / b, db = -dout * y / b."""
    _, b = call.args

    def db() -> Expr:
        return e.unary("negative", e.divide(e.multiply(dout, out), b))

    return _both(call, e, lambda: e.divide(dout, b), db)


@gradient("power")
def power_grad(call: Any, out: Expr, dout: Expr, e: Emitter) -> Sequence[Any]:
    """da = dout * b * a^(b-1), db = dout * y * log(a), 0 where a is 0."""
    a, b = call.args

    def da() -> Expr:
        exponent = scalar_value(b)
        lower = e.subtract(b, 1.0) if exponent is None else exponent - 1.0
        return e.multiply(dout, e.multiply(e.binary("power", a, lower), b))

    def db() -> Expr:
        positive = e.binary("greater", a, 0.0)
        log = e.where(positive, e.unary("log", e.where(positive, a, 1.0)), 0.0)
        return e.multiply(dout, e.multiply(out, log))

    return _both(call, e, da, db)


@gradient("maximum", "minimum")
def extremum_grad(call: Any, out: Expr, dout: Expr, e: Emitter) -> Sequence[Any]:
    """dout goes to the operand that won; equal operands share it, as in torch."""
    a, b = call.args
    wins = "greater" if op_name(call) == "maximum" else "less"

    def partial(x: Expr, other: Expr) -> Expr:
        tied = e.where(e.binary("equal", x, other), e.multiply(dout, 0.5), 0.0)
        return e.where(e.binary(wins, x, other), dout, tied)

    return _both(call, e, lambda: partial(a, b), lambda: partial(b, a))


@gradient("mod")
def mod_grad(call: Any, out: Expr, dout: Expr, e: Emitter) -> Sequence[Any]:
    """da = dout, db = -dout * floor(a / b)."""
    a, b = call.args

    def db() -> Expr:
        whole = e.unary("floor", e.divide(a, b))
        return e.unary("negative", e.multiply(dout, whole))

    return _both(call, e, lambda: dout, db)


@gradient("where")
def where_grad(call: Any, out: Expr, dout: Expr, e: Emitter) -> Sequence[Any]:
    """da = dout where the condition holds, db = dout elsewhere."""
    condition, a, b = call.args
    return [
        None,
        lambda: e.sum_to(e.where(condition, dout, 0.0), shape_of(a)),
        lambda: e.sum_to(e.where(condition, 0.0, dout), shape_of(b)),
    ]
