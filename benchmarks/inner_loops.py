"""Innermost loops of AArch64 machine code: how dense they are, and whether registers spill.

    python -m benchmarks.inner_loops build/rpi4/mobilenetv2/model.so [--mca] [--cpu cortex-a72]

`--mca` asks LLVM's model of the processor's pipelines (llvm-mca; apt install llvm) for the cycles
of an iteration, every load a hit: what the ports allow, not a time on a board.

A loop is a backward branch with no other backward branch inside. Loads and stores of vector
registers relative to the stack pointer inside one are spills: the kernels' own loops address
buffers through general registers. Encodings: Arm ARM (DDI 0487), C4.1.
"""

from __future__ import annotations

import argparse
import re
import shutil
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

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
    words: tuple[int, ...] = ()

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
                        sum(map(is_spill, body)), tuple(body))  # fmt: skip
            if loop.fma >= least_fma:
                found.append(loop)
    return found


def cycles(loop: Loop, cpu: str = "cortex-a72", iterations: int = 100) -> float:
    """Cycles of one iteration by llvm-mca's model of the processor."""
    code = struct.pack(f"<{len(loop.words)}I", *loop.words)
    text = _run(["llvm-mc", "--disassemble", "-triple=aarch64"], code.hex(" ", 1), "0x")
    command = ["llvm-mca", "-mtriple=aarch64", f"-mcpu={cpu}", f"-iterations={iterations}"]
    found = re.search(r"Total Cycles:\s+(\d+)", _run(command, text))
    if found is None:
        raise ValueError(f"llvm-mca says nothing about the loop at {loop.start:#x}")
    return int(found[1]) / iterations


def _run(command: list[str], text: str, prefix: str = "") -> str:
    if prefix:
        text = " ".join(prefix + part for part in text.split())
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


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


def main(argv: list[str] | None = None) -> int:
    """Print the loops of a file, equal ones together, the largest first."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, help="an AArch64 object file or library")
    parser.add_argument("--mca", action="store_true", help="cycles by llvm-mca's model")
    parser.add_argument("--cpu", default="cortex-a72")
    options = parser.parse_args(argv)
    if options.mca and not (shutil.which("llvm-mca") and shutil.which("llvm-mc")):
        print("no llvm-mca or llvm-mc on PATH: apt install llvm", file=sys.stderr)
        return 1
    rows: Counter[tuple[int, int, int, float]] = Counter()
    for loop in inner_loops(options.file.read_bytes()):
        spent = cycles(loop, options.cpu) if options.mca else 0.0
        rows[loop.fma, loop.instructions, loop.spills, spent] += 1
    print("loops   FMLA  instructions  dense  spills" + "  cycles  FMLA/cycle" * options.mca)
    for (fma, instructions, spills, spent), count in sorted(rows.items(), reverse=True):
        line = f"{count:5d} {fma:6d} {instructions:13d} {fma / instructions:6.0%} {spills:7d}"
        print(line + (f" {spent:7.1f} {fma / spent:11.2f}" if options.mca else ""))
    if options.mca and rows:
        whole = sum(n * row[0] for row, n in rows.items()) / sum(n * r[3] for r, n in rows.items())
        print(f"all of them, each once: {whole:.2f} FMLA a cycle on {options.cpu}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
