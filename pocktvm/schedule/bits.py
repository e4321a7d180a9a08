"""Masks of one bit a channel, written and read by the loops of any kernel (passes/save_masks.py).

A byte holds `group` channels, and rows are padded to bytes. Loops whose vectors begin at multiples
of `group` (fuse sees to that) write whole bytes; what is left of a row is written in the pieces the
loops have, narrower from one to the next, so that all but the first add to a byte that is there.

Comparisons become a word by a cast to one-bit integers, which LLVM turns into an instruction
(AVX-512: vcmpps, kmovw to memory; AVX2: vmovmskps), below eight lanes by a sum of powers of two
(NEON: and, addv). A word becomes a mask by testing each lane's bit (AVX-512: kmovw alone).
"""

from __future__ import annotations

from typing import Any

from pocktvm.errors import InternalError
from pocktvm.schedule.emit import const, load, store
from pocktvm.schedule.loops import ceil_div
from pocktvm.tvm_api import T, tirx

Expr = Any


def row_bytes(channels: int, group: int) -> int:
    """Bytes of a row of masks: one for every `group` channels, the last perhaps in part."""
    return ceil_div(channels, group)


def write(
    buffer: Any, row: Expr, column: Expr, channels: int, group: int, truth: Expr, width: int
) -> None:
    """Store the bits of `width` channels from `column` on; `row` is the byte a row begins at."""
    if width >= group:
        word, count = _word(truth, width), width // group
        if count > 1 and group < 8:
            raise InternalError(f"{width} lanes write {count} bytes of {group} bits")
        if count > 1:
            word = tirx.reinterpret(f"uint8x{count}", word)
        store(buffer, row + _byte(column, group), word, count)
        return
    rest = channels % group
    shift = rest & -2 * width  # the wider pieces of the last byte are there already
    if not rest & width:
        raise InternalError(f"a piece of {width} in a row of {channels} channels")
    at = row + channels // group
    word = tirx.Cast("int32", _word(truth, width))
    if shift:
        old = tirx.Cast("int32", load(buffer, at, 1))
        word = tirx.bitwise_or(old, tirx.shift_left(word, tirx.const(shift, "int32")))
    store(buffer, at, tirx.Cast("uint8", word), 1)


def read(buffer: Any, row: Expr, column: Expr, group: int, width: int) -> Expr:
    """A vector of booleans: the bits of `width` channels from `column` on."""
    count = max(1, width // group)
    word = load(buffer, row + _byte(column, group), count)
    if count > 1:
        word = tirx.reinterpret(f"uint{8 * count}", word)
    word = tirx.Cast("int32", word)
    if width < group:
        word = tirx.shift_right(word, tirx.bitwise_and(column, tirx.const(group - 1, "int32")))
    word = T.bind(word)
    if width == 1:
        return tirx.NE(tirx.bitwise_and(word, tirx.const(1, "int32")), tirx.const(0, "int32"))
    bits = tirx.bitwise_and(tirx.Broadcast(word, width), _powers(width))
    return tirx.NE(bits, const(0, width, "int32"))


def _byte(column: Expr, group: int) -> Expr:
    if isinstance(column, int):
        return column // group
    return tirx.shift_right(column, tirx.const(group.bit_length() - 1, "int32"))


def _word(truth: Expr, width: int) -> Expr:
    """An unsigned integer of one bit a lane, in at least eight bits."""
    if width == 1:
        return tirx.Select(truth, tirx.const(1, "uint8"), tirx.const(0, "uint8"))
    if width >= 8:
        ones = tirx.Select(truth, const(-1, width, "int32"), const(0, width, "int32"))
        return tirx.reinterpret(f"uint{width}", tirx.Cast(f"uint1x{width}", ones))
    powers = tirx.Select(truth, _powers(width), const(0, width, "int32"))
    total = T.call_llvm_pure_intrin("int32", f"llvm.vector.reduce.add.v{width}i32", powers)
    return tirx.Cast("uint8", total)


def _powers(width: int) -> Expr:
    """1, 2, 4, … in the lanes."""
    lanes = [tirx.const(1 << i, "int32") for i in range(width)]
    return tirx.Shuffle(lanes, list(range(width)))
