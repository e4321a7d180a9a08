"""Vectorised elementary functions: libm's would be one scalar call a lane (3x slower than torch).

Coefficients: exp and log after Cephes (Moshier), 1-2 ulp over float32's range; erf as the 7/5
rational of Eigen, absolute error below 3e-7.
"""

from __future__ import annotations

from typing import Any

from pocktvm.schedule.emit import const, splat
from pocktvm.tvm_api import T, tirx

Expr = Any


def _int(width: int) -> str:
    return "int32" if width == 1 else f"int32x{width}"


def _float(width: int) -> str:
    return "float32" if width == 1 else f"float32x{width}"


def _poly(x: Expr, coefficients: tuple[float, ...], width: int) -> Expr:
    result = const(coefficients[0], width)
    for c in coefficients[1:]:
        result = result * x + const(c, width)
    return result


def exp(x: Expr, width: int) -> Expr:
    """e**x; below -87.3 the smallest normal number, above 88.37 about 2.4e38."""
    x = T.bind(tirx.Max(tirx.Min(x, const(88.3762626647949, width)), const(-87.3365447504, width)))
    n = T.bind(tirx.nearbyint(x * const(1.44269504088896341, width)))
    r = T.bind(x - n * const(0.693359375, width) - n * const(-2.12194440e-4, width))
    p = _poly(
        r,
        (
            1.9875691500e-4,
            1.3981999507e-3,
            8.3334519073e-3,
            4.1665795894e-2,
            1.6666665459e-1,
            5.0000001201e-1,
        ),
        width,
    )
    p = p * (r * r) + r + const(1.0, width)
    bits = (tirx.Cast(_int(width), n) + const(127, width, "int32")) << const(23, width, "int32")
    return T.bind(p * tirx.reinterpret(_float(width), bits))


def log(x: Expr, width: int) -> Expr:
    """Natural logarithm of positive normal numbers (0 gives about -87, negative is undefined)."""
    x = T.bind(tirx.Max(x, const(1.17549435e-38, width)))
    bits = T.bind(tirx.reinterpret(_int(width), x))
    e = tirx.Cast(_float(width), (bits >> const(23, width, "int32")) - const(126, width, "int32"))
    m = tirx.reinterpret(
        _float(width),
        (bits & const(0x007FFFFF, width, "int32")) | const(0x3F000000, width, "int32"),
    )
    m = T.bind(m)
    small = m < const(0.707106781186547524, width)
    e = T.bind(e - tirx.Select(small, const(1.0, width), const(0.0, width)))
    m = T.bind(tirx.Select(small, m + m, m) - const(1.0, width))
    z = T.bind(m * m)
    p = _poly(
        m,
        (
            7.0376836292e-2,
            -1.1514610310e-1,
            1.1676998740e-1,
            -1.2420140846e-1,
            1.4249322787e-1,
            -1.6668057665e-1,
            2.0000714765e-1,
            -2.4999993993e-1,
            3.3333331174e-1,
        ),
        width,
    )
    y = p * m * z + e * const(-2.12194440e-4, width) - z * const(0.5, width)
    return T.bind(m + y + e * const(0.693359375, width))


def erf(x: Expr, width: int) -> Expr:
    """The error function."""
    x = T.bind(tirx.Max(tirx.Min(x, const(4.0, width)), const(-4.0, width)))
    z = T.bind(x * x)
    p = _poly(
        z,
        (
            -2.72614225801306e-10,
            2.77068142495902e-08,
            -2.10102402082508e-06,
            -5.69250639462346e-05,
            -7.34990630326855e-04,
            -2.95459980854025e-03,
            -1.60960333262415e-02,
        ),
        width,
    )
    q = _poly(
        z,
        (
            -1.45660718464996e-05,
            -2.13374055278905e-04,
            -1.68282697438203e-03,
            -7.37332916720468e-03,
            -1.42647390514189e-02,
        ),
        width,
    )
    return T.bind(x * p / q)


def sigmoid(x: Expr, width: int) -> Expr:
    """1 / (1 + e**-x)."""
    one = const(1.0, width)
    return T.bind(one / (one + exp(const(0.0, width) - x, width)))


def tanh(x: Expr, width: int) -> Expr:
    """Hyperbolic tangent: a polynomial near zero (no cancellation), by exp elsewhere."""
    x = T.bind(x)
    z = T.bind(x * x)
    near = x + x * z * _poly(
        z,
        (
            -5.70498872745e-3,
            2.06390887954e-2,
            -5.37397155531e-2,
            1.33314422036e-1,
            -3.33332819422e-1,
        ),
        width,
    )
    far = const(1.0, width) - const(2.0, width) / (exp(x + x, width) + const(1.0, width))
    return T.bind(tirx.Select(z < const(0.390625, width), near, far))


def sqrt(x: Expr, width: int) -> Expr:
    """Square root (an instruction on every target)."""
    return tirx.sqrt(x)


def scalar_calls(function: Any, x: Expr, width: int) -> Expr:
    """libm, lane by lane, for functions that are rare in a training step."""
    if width == 1:
        return function(x)
    return tirx.Shuffle(
        [function(tirx.Shuffle([x], [i])) for i in range(width)], list(range(width))
    )


__all__ = ["erf", "exp", "log", "scalar_calls", "sigmoid", "splat", "sqrt", "tanh"]
