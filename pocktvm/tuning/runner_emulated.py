"""Candidates under the target's emulator, ranked by what they execute: no board, no clock.

An emulator's time says nothing about a board's, so a call is counted (counter.c) and the counts are
weighed: two instructions a cycle, and a miss of the modelled caches at the Cortex-A72's latencies.
That ranks candidates that differ in spills, address arithmetic and locality; it knows nothing of
ports, prefetch or threads, and is not calibrated on a board.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from pocktvm.errors import PockError
from pocktvm.ir.target import Target
from pocktvm.manifest import emulator_of
from pocktvm.tuning.counter import CannotCount, Counts, build_plugin, count_between_clock_calls
from pocktvm.tuning.program import ProgramRunner
from pocktvm.tuning.runners import TIMEOUT_SECONDS, CandidateError

# Cycles. L1: a load-to-use latency of about 17 from L2 less the 4 of a hit, partly hidden by
# out-of-order execution; L2: about 150 to LPDDR4, halved by the two misses usually in flight.
PER_INSTRUCTION, PER_L1_MISS, PER_L2_MISS = 0.5, 8.0, 75.0
NOMINAL_HZ = 1.5e9  # only makes records readable: ratios are what counts


def modelled_seconds(counts: Counts) -> float:
    """What a Cortex-A72 would take, by the weights above."""
    cycles = PER_INSTRUCTION * counts.instructions
    cycles += PER_L1_MISS * counts.l1_misses + PER_L2_MISS * counts.l2_misses
    return cycles / NOMINAL_HZ


class EmulatedRunner(ProgramRunner):
    """qemu-aarch64 with the counting plugin; one thread."""

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        if target.arch != "aarch64" or not target.emulator:
            raise PockError(
                f"--runner emulated counts instructions under qemu-aarch64; {target.name} is "
                f"{target.os} {target.arch}.\n  Use --runner ssh://host or rpc://host:port/key."
            )
        command = list(target.emulator)
        self._emulator = emulator_of({"emulator": command, "target": target.name}) or command
        self._folder = tempfile.TemporaryDirectory(prefix="pocktvm-count-")
        try:
            self._plugin = build_plugin(self._emulator[0], Path(self._folder.name))
        except CannotCount as reason:
            raise PockError(f"--runner emulated: {reason}.") from None

    def run_program(self, program: Path, inputs: bytes) -> tuple[float | None, bytes]:
        """(modelled seconds of the second call, what the program wrote)."""
        try:
            marks, written = count_between_clock_calls(
                self._emulator, self._plugin, [str(program), "1", "once"],
                Path(self._folder.name) / "counts", stdin=inputs, seconds=6 * TIMEOUT_SECONDS,
            )  # fmt: skip
        except (CannotCount, subprocess.TimeoutExpired) as reason:
            raise CandidateError(str(reason)[:300]) from None
        if len(marks) != 2:
            raise CandidateError(f"asked the clock {len(marks)} times, not twice")
        return modelled_seconds(marks[1] - marks[0]), written

    def close(self) -> None:
        """Remove the plugin."""
        self._folder.cleanup()
