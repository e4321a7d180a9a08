"""Eight-bit integers with an exponent a vector, written and read by the loops of any kernel
(passes/narrow_saved.py, "int8").

A block is a vector of `group` channels; its exponent is that of its largest magnitude, which
registers know without a second look at the data. What is left of a row are blocks of 8, 4, 2 and 1,
as loops end. All of it is integer arithmetic on the floats' bits: adding 1.5 * 2**23 leaves the
rounded integer in the lower bits (to nearest, ties to even), so no target calls a library.

Source: MXINT8 of the OCP Microscaling formats (Rouhani et al. 2023), its blocks as wide as vectors.
"""

from __future__ import annotations

from typing import Any

from pocktvm.errors import InternalError
from pocktvm.schedule.emit import const, load, splat, store
from pocktvm.tvm_api import T, tirx

Expr = Any
MAGIC = 12582912.0  # 1.5 * 2**23
BITS = 6  # the largest magnitude lies between 2**6 and 2**7
SMALLEST = 8  # exponent, biased: below it all are zero, and every scale is a normal number


def row_blocks(channels: int, group: int) -> int:
    """Blocks, and bytes of exponents, of a row."""
    return channels // group + (channels % group).bit_count()


def quantize(x: Expr, width: int) -> tuple[Expr, Expr]:
    """(int8 vector, exponent): the block's values over a power of two."""
    magnitude = tirx.bitwise_and(_bits(x, width), const(0x7FFFFFFF, width, "int32"))
    largest = magnitude
    if width > 1:
        name = f"llvm.vector.reduce.smax.v{width}i32"
        largest = T.call_llvm_pure_intrin("int32", name, magnitude)
    exponent = tirx.shift_right(largest, tirx.const(23, "int32"))
    exponent = T.bind(tirx.Max(exponent, tirx.const(SMALLEST, "int32")))
    scaled = x * splat(_power(254 + BITS - exponent), width)
    return rounded(tirx.Min(scaled, const(127.0, width)), "int8", width), exponent


def restore(codes: Expr, exponent: Expr, width: int) -> Expr:
    """float32 values of a block: its codes times the power of two that `exponent` stands for."""
    return floats(codes, width) * splat(_power(exponent - BITS), width)


def rounded(x: Expr, dtype: str, width: int) -> Expr:
    """The nearest integers in one byte; x lies in its range."""
    bits = _bits(x + const(MAGIC, width), width)
    return tirx.Cast(_lanes(dtype, width), bits)


def floats(codes: Expr, width: int) -> Expr:
    """int8 codes as a float32 vector, not scaled yet."""
    return tirx.Cast(_lanes("float32", width), tirx.Cast(_lanes("int32", width), codes))


def write(buffer: Any, row: Expr, column: Expr, channels: int, group: int, exponent: Expr,
          width: int) -> None:  # fmt: skip
    """Store a block's exponent; `row` is where a row's begin."""
    at = _index(row, column, channels, group, width)
    store(buffer, at, tirx.Cast("uint8", exponent), 1)


def read(buffer: Any, row: Expr, column: Expr, channels: int, group: int, width: int) -> Expr:
    """The exponent (int32) of the block that holds these channels."""
    at = _index(row, column, channels, group, width)
    return T.bind(tirx.Cast("int32", load(buffer, at, 1)))


def _index(row: Expr, column: Expr, channels: int, group: int, width: int) -> Expr:
    if width == group:
        return row + tirx.shift_right(column, tirx.const(group.bit_length() - 1, "int32"))
    rest = channels % group
    if width > group or not rest & width:
        raise InternalError(f"a piece of {width} in a row of {channels} channels")
    return row + channels // group + (rest & -2 * width).bit_count()


def _power(biased: Expr) -> Expr:
    """2**(biased - 127)."""
    return T.bind(tirx.reinterpret("float32", tirx.shift_left(biased, tirx.const(23, "int32"))))


def _bits(x: Expr, width: int) -> Expr:
    return T.bind(tirx.reinterpret(_lanes("int32", width), x))


def _lanes(dtype: str, width: int) -> str:
    return dtype if width == 1 else f"{dtype}x{width}"
