"""float32 to the bits of a bfloat16 and back, by shifts: no target needs to know the type; and to a
share of a range that is known before, in a byte. Blocks with an exponent: schedule/blocks.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pocktvm.schedule.blocks import floats, rounded
from pocktvm.schedule.elementwise_ops.table import Expr, op
from pocktvm.schedule.emit import const
from pocktvm.tvm_api import T, tirx

QUIET = 0x40  # the upper half's bit that makes a NaN quiet, and keeps one a NaN when cut
INFINITY = 0x7F800000


@op("pack_bf16")
def pack_bf16(a: list[Expr], attrs: Mapping[str, Any], width: int, dtype: str) -> Expr:
    """uint16: the upper half of x, rounded to the nearest, ties to even; a NaN stays one.

    Half of the last bit kept, less one unless that bit is set, carries into it exactly when x is
    nearer to the next value. The sum of what is no NaN stays below 2**32.
    """
    bits = T.bind(tirx.reinterpret(_lanes("uint32", width), a[0]))
    upper = tirx.shift_right(bits, _word(16, width))
    half = tirx.bitwise_and(upper, _word(1, width)) + _word(0x7FFF, width)
    rounded = tirx.shift_right(bits + half, _word(16, width))
    is_nan = tirx.GT(tirx.bitwise_and(bits, _word(0x7FFFFFFF, width)), _word(INFINITY, width))
    chosen = tirx.Select(is_nan, tirx.bitwise_or(upper, _word(QUIET, width)), rounded)
    return tirx.Cast(_lanes("uint16", width), chosen)


@op("unpack_bf16")
def unpack_bf16(a: list[Expr], attrs: Mapping[str, Any], width: int, dtype: str) -> Expr:
    """float32 with these bits as its upper half."""
    bits = tirx.Cast(_lanes("uint32", width), a[0])
    return tirx.reinterpret(_lanes("float32", width), tirx.shift_left(bits, _word(16, width)))


@op("pack_u8")
def pack_u8(a: list[Expr], attrs: Mapping[str, Any], width: int, dtype: str) -> Expr:
    """uint8: 255 x / top, to the nearest."""
    return rounded(a[0] * const(255.0 / attrs["top"], width), "uint8", width)


@op("unpack_u8")
def unpack_u8(a: list[Expr], attrs: Mapping[str, Any], width: int, dtype: str) -> Expr:
    """float32 from such a byte."""
    return floats(a[0], width) * const(attrs["top"] / 255.0, width)


def _lanes(dtype: str, width: int) -> str:
    return dtype if width == 1 else f"{dtype}x{width}"


def _word(value: int, width: int) -> Expr:
    return const(value, width, "uint32")
