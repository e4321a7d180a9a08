"""Counts of an artifact's step under qemu-aarch64 with our plugin (counter.c), kernel by kernel.

`pocktvm-run --profile` asks the clock between kernels, and under an emulator a question to the
clock is a system call that a plugin sees: the counts between two of them are one kernel's.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import astuple, dataclass, fields
from pathlib import Path

SOURCE = Path(__file__).with_name("counter.c")
# One question before the step, one before its first kernel, one behind every kernel, one behind
# the step, one for the report of progress (runtime/c/train.c, runtime.c).
AROUND = 4


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
        """By name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class StepCounts:
    """The last step of a run: all of it, and each of its kernels in order."""

    step: Counts
    kernels: tuple[Counts, ...]


def count_step(artifact: Path, *, caches: bool = True, steps: int = 2) -> StepCounts:
    """Run an aarch64 artifact's own program for `steps` steps on one thread; the last is counted.

    Raises CannotCount where qemu or a compiler is missing."""
    manifest = json.loads((artifact / "manifest.json").read_text())
    if manifest["arch"] != "aarch64":
        raise CannotCount(f"{artifact} is for {manifest['arch']}; the counter reads aarch64")
    emulator = list(manifest["emulator"])
    calls = len(manifest["timeline"]["step"])
    with tempfile.TemporaryDirectory(prefix="pocktvm-count-") as folder:
        plugin, out = build_plugin(emulator[0], Path(folder)), Path(folder) / "counts"
        options = f"{plugin},out={out},caches={int(caches)}"
        runner = [*emulator[1:], str(artifact / "pocktvm-run"), str(artifact)]
        asked = ["--steps", str(steps), "--threads", "1", "--profile", "--json"]
        command = [emulator[0], "-plugin", options, *runner, *asked]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not out.exists():
            raise CannotCount(f"{emulator[0]} with the plugin failed: {done.stderr.strip()[-300:]}")
        marks = [Counts(*map(int, line.split())) for line in out.read_text().splitlines()]
    return _last_step(marks[:-1], calls, steps)  # the last line is the end of the program


def _last_step(marks: list[Counts], calls: int, steps: int) -> StepCounts:
    a_step = calls + AROUND
    if len(marks) < steps * a_step:
        raise CannotCount(f"saw the clock {len(marks)} times, expected {steps * a_step}")
    before, *kernels, behind, _ = marks[-a_step:]
    each = (b - a for a, b in itertools.pairwise(kernels))
    return StepCounts(behind - before, tuple(each))


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
