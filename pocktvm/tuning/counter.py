"""What a program executes under qemu-aarch64: our plugin (counter.c) and its counts."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

SOURCE = Path(__file__).with_name("counter.c")


class CannotCount(Exception):
    """What this machine lacks, in one line."""


@dataclass(frozen=True)
class Counts:
    """Executed instructions by kind, and misses of the modelled data caches (0: not modelled)."""

    instructions: int = 0
    fma_vector: int = 0  # fmla and fmls of four float32 lanes
    fma_other: int = 0  # two lanes, and scalar
    loads: int = 0
    stores: int = 0
    l1_misses: int = 0
    l2_misses: int = 0

    def __sub__(self, other: Counts) -> Counts:
        return Counts(*(a - b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def as_dict(self) -> dict[str, int]:
        """The counts by their field's name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def count_between_clock_calls(
    emulator: Sequence[str], plugin: Path, command: Sequence[str], out: Path, *,
    caches: bool = True, stdin: bytes | None = None, seconds: float | None = None,
) -> tuple[list[Counts], bytes]:
    """(totals at every question to the clock, what the program printed); `out` is scratch.

    Under an emulator such a question is a system call that a plugin sees. Raises CannotCount where
    the program fails, subprocess.TimeoutExpired after `seconds`."""
    options = f"{plugin},out={out},caches={int(caches)}"
    words = [emulator[0], "-plugin", options, *emulator[1:], *command]
    done = subprocess.run(words, capture_output=True, input=stdin, timeout=seconds)
    if done.returncode or not out.exists():
        text = done.stderr.decode(errors="replace").strip()[-300:]
        raise CannotCount(f"{emulator[0]} with the plugin failed: {text}")
    marks = [Counts(*map(int, line.split())) for line in out.read_text().splitlines()]
    return marks[:-1], done.stdout  # the last line is the end of the program


def build_plugin(emulator: str, folder: Path) -> Path:
    """The plugin, compiled for the machine's qemu. Raises CannotCount."""
    if shutil.which(emulator) is None:
        raise CannotCount(f"there is no {emulator}; install qemu-user")
    text = subprocess.run([emulator, "-h"], capture_output=True, text=True).stdout
    if "-plugin" not in text:
        raise CannotCount(f"this {emulator} was built without plugins")
    plugin = folder / "counter.so"
    flags = ["-O2", "-shared", "-fPIC", f"-DAPI={_api_version(emulator)}"]
    command = [*_compiler(), *flags, str(SOURCE), "-o", str(plugin)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CannotCount(f"the plugin does not compile: {done.stderr.strip()[:300]}")
    return plugin


def _compiler() -> list[str]:
    found = next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), None)
    return [found] if found else [sys.executable, "-m", "ziglang", "cc"]


def _api_version(emulator: str) -> int:
    """The plugin interface to claim: 1 up to qemu 8, 2 for 9.0, 3 from 9.1 on."""
    text = subprocess.run([emulator, "--version"], capture_output=True, text=True).stdout
    match = re.search(r"version (\d+)\.(\d+)", text)
    version = (int(match[1]), int(match[2])) if match else (7, 2)
    return 1 if version < (9, 0) else 2 if version < (9, 1) else 3
