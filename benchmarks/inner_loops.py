"""Innermost loops of AArch64 machine code: how dense they are, and whether registers spill.

A loop is a backward branch with no other backward branch inside. Loads and stores of vector
registers relative to the stack pointer inside one are spills: the kernels'
own loops address buffers through general registers. Encodings: Arm ARM (DDI 0487), C4.1.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

EXECUTABLE = 0x4  # SHF_EXECINSTR
STACK_POINTER = 31  # x29 is a general register in code without frames, as TVM makes it


@dataclass(frozen=True)
class Loop:
    """One innermost loop, counted in instructions."""

    section: str
    start: int
    instructions: int
    fma: int
    spills: int

    @property
    def density(self) -> float:
        """The share of its instructions that multiply and add vectors."""
        return self.fma / self.instructions


def inner_loops(elf: bytes, least_fma: int = 8) -> list[Loop]:
    """The innermost loops of an object file or library with at least `least_fma` vector FMAs."""
    found = []
    for name, code in executable_sections(elf):
        words = struct.unpack(f"<{len(code) // 4}I", code[: len(code) // 4 * 4])
        for start, stop in _innermost(words):
            body = words[start:stop]
            loop = Loop(name, 4 * start, len(body), sum(map(is_vector_fma, body)),
                        sum(map(is_spill, body)))  # fmt: skip
            if loop.fma >= least_fma:
                found.append(loop)
    return found


def executable_sections(elf: bytes) -> Iterator[tuple[str, bytes]]:
    """(name, contents) of a 64-bit little-endian ELF file's code."""
    if elf[:6] != b"\x7fELF\x02\x01":
        raise ValueError("not a 64-bit little-endian ELF file")
    table, size, count, names_index = (
        struct.unpack_from("<Q", elf, 40)[0],
        *struct.unpack_from("<HHH", elf, 58),
    )
    headers = [struct.unpack_from("<IIQQQQ", elf, table + i * size) for i in range(count)]
    names = headers[names_index][4]
    for name, _, flags, _, offset, length in headers:
        if flags & EXECUTABLE and length:
            start = names + name
            yield elf[start : elf.index(b"\0", start)].decode(), elf[offset : offset + length]


def is_vector_fma(word: int) -> bool:
    """fmla or fmls of single precision vectors, by vector or by lane."""
    return (word & 0xBF60FC00) == 0x0E20CC00 or (word & 0xBFC0B400) == 0x0F801000


def is_spill(word: int) -> bool:
    """A load or store of vector registers (single or pair) on the stack."""
    on_stack = (word >> 5 & 31) == STACK_POINTER
    single = (word & 0x3E000000) == 0x3C000000
    pair = (word & 0x3E000000) == 0x2C000000
    return on_stack and (single or pair)


def _innermost(words: Sequence[int]) -> Iterator[tuple[int, int]]:
    """[start, stop) of backward branches that enclose no other."""
    last_start = -1
    for at, word in enumerate(words):
        target = _branch_target(at, word)
        if target is None or not 0 <= target <= at:
            continue
        if target > last_start:
            yield target, at + 1
        last_start = max(last_start, at)


def _branch_target(at: int, word: int) -> int | None:
    """Where a branch inside a function goes, in words; None for everything else."""
    if (word & 0xFF000010) == 0x54000000 or (word & 0x7E000000) == 0x34000000:
        return at + _signed(word >> 5, 19)  # b.cond, cbz, cbnz
    if (word & 0x7E000000) == 0x36000000:
        return at + _signed(word >> 5, 14)  # tbz, tbnz
    if (word & 0xFC000000) == 0x14000000:
        return at + _signed(word, 26)  # b
    return None


def _signed(value: int, bits: int) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value
