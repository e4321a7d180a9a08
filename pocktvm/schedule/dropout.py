"""Dropout inside any kernel: an element's fate is a hash of its place, the step and the layer.

    h = mix(mix(index + a) + b)  with a, b from (seed of the step, key of the layer)
    y = x / (1 - p) where h / 2**8 >= p * 2**24, else 0

No mask is stored: the backward pass makes the same one again, for four multiplications an element,
which costs less than moving even one bit through memory would. All of it is integer arithmetic
modulo 2**32, so every target drops the same elements; `reference/dropout.py` is the same in numpy.
Source of the mixer: "lowbias32" of C. Wellons' hash prospector; counters instead of a state as in
Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pocktvm.schedule.emit import const, load, local, splat, store
from pocktvm.tvm_api import tirx

Expr = Any
_BITS = "uint32"


def drop(x: Expr, seed: Expr, index: Expr, attrs: Mapping[str, Any], width: int) -> Expr:
    """`width` elements x from flat index `index`, dropped or scaled; `seed` is an int32 scalar."""
    p, key = float(attrs["p"]), int(attrs["key"])
    a = _mix(tirx.bitwise_xor(_bits(seed, 1), _word(_times(key, 0x9E3779B9), 1)), 1)
    b = _mix(_sum(a, _word(0x85EBCA6B, 1), 1), 1)
    index = index + int(attrs.get("start", 0))
    lanes = index if width == 1 else tirx.Ramp(index, 1, width)
    h = _mix(_sum(_bits(lanes, width), splat(a, width), width), width)
    h = _mix(_sum(h, splat(b, width), width), width)
    top = tirx.shift_right(h, _word(8, width))
    keeps = tirx.GE(_cast("int32", top, width), splat(tirx.const(round(p * 2**24), "int32"), width))
    scaled = x * const(1.0 / (1.0 - p), width)
    return tirx.Select(keeps, scaled, const(0.0, width))


def _mix(h: Expr, width: int) -> Expr:
    """Every bit of h changes every bit of the result with a probability of about one half."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        h = _held(h, width)
        h = tirx.bitwise_xor(h, tirx.shift_right(h, _word(shift, width)))
        h = _low(_wide(h, width) * _wide(_word(factor, width), width), width)
    h = _held(h, width)
    return _held(tirx.bitwise_xor(h, tirx.shift_right(h, _word(16, width))), width)


def _sum(a: Expr, b: Expr, width: int) -> Expr:
    return _low(_wide(a, width) + _wide(b, width), width)


def _wide(x: Expr, width: int) -> Expr:
    """Products and sums are taken in 64 bits: TVM declares that they do not overflow, and LLVM
    believes it (all of it became "keep"). The cast back lets LLVM use 32-bit ones again."""
    return _cast("uint64", x, width)


def _low(x: Expr, width: int) -> Expr:
    return _cast(_BITS, x, width)


def _held(x: Expr, width: int) -> Expr:
    """x by way of a register buffer: TVM would write an integer's value in the place of its name,
    over and over, until the expression fills memory."""
    scratch = local(width, _BITS)
    store(scratch, 0, x, width)
    return load(scratch, 0, width)


def _times(a: int, b: int) -> int:
    return a * b % 2**32


def _word(value: int, width: int) -> Expr:
    return splat(tirx.const(value, _BITS), width)


def _bits(x: Expr, width: int) -> Expr:
    return _cast(_BITS, x, width)


def _cast(dtype: str, x: Expr, width: int) -> Expr:
    return tirx.Cast(dtype if width == 1 else f"{dtype}x{width}", x)
