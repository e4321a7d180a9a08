"""Counts of an artifact's step under qemu-aarch64, kernel by kernel (pocktvm/tuning/counter.py).

`pocktvm-run --profile` asks the clock between kernels, and under an emulator a question to the
clock is a system call that a plugin sees: the counts between two of them are one kernel's.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pocktvm.tuning.counter import (
    CannotCount,
    Counts,
    build_plugin,
    count_between_clock_calls,
)

# One question before the step, one before its first kernel, one behind every kernel, one behind
# the step, one for the report of progress (runtime/c/train.c, runtime.c).
AROUND = 4


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
        asked = ["--steps", str(steps), "--threads", "1", "--profile", "--json"]
        command = [str(artifact / "pocktvm-run"), str(artifact), *asked]
        marks, _ = count_between_clock_calls(emulator, plugin, command, out, caches=caches)
    return _last_step(marks, calls, steps)


def _last_step(marks: list[Counts], calls: int, steps: int) -> StepCounts:
    a_step = calls + AROUND
    if len(marks) < steps * a_step:
        raise CannotCount(f"saw the clock {len(marks)} times, expected {steps * a_step}")
    before, *kernels, behind, _ = marks[-a_step:]
    each = (b - a for a, b in itertools.pairwise(kernels))
    return StepCounts(behind - before, tuple(each))
