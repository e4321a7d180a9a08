"""Who takes part in a sitting of benchmarks.step, and how each is asked for times.

`Worker` speaks workers/protocol.py: it stays alive between rounds and is asked for a few steps in
each. `Script` is a peer with an environment of its own (TensorFlow, ONNX Runtime, JAX): every round
launches its script anew, which times its steps itself and prints one JSON line.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

ROUND_MS = 400.0
SCRIPT_SECONDS = 900


@dataclass
class Contestant:
    """The times a contestant has answered. `times` are milliseconds a step."""

    name: str
    command: list[str]
    times: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    rss_bytes: int = 0

    @property
    def median_ms(self) -> float:
        """Median milliseconds a step."""
        return statistics.median(self.times)


@dataclass
class Worker(Contestant):
    """A process of ours that answers rounds on stdin."""

    process: subprocess.Popen | None = None

    def start(self, threads: int) -> None:
        """Launch and wait for its warm-up."""
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} did not start: {' '.join(self.command)}")
        ready = json.loads(line)
        self.losses, self.rss_bytes = ready["losses"], ready["rss_bytes"]
        for _ in range(2):  # the first round only tells how many steps the others may have
            self.times.clear()
            self._steps(2)

    def round(self) -> None:
        """About ROUND_MS of steps, by what was seen so far."""
        self._steps(max(2, min(50, round(ROUND_MS / statistics.median(self.times)))))

    def stop(self) -> None:
        """End the process."""
        if self.process:
            self.process.kill()
            self.process.wait()

    def _steps(self, steps: int) -> None:
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        self.times += json.loads(self.process.stdout.readline())


@dataclass
class Script(Contestant):
    """A peer's own script; a round is one launch, and its median one time."""

    folder: Path = Path()

    def start(self, threads: int) -> None:
        """The first launch: makes what the peer keeps on disk, and gives the loss."""
        self.round()
        self.times.clear()

    def round(self) -> None:
        """Launch once."""
        done = subprocess.run(
            self.command, cwd=self.folder, capture_output=True, text=True, timeout=SCRIPT_SECONDS
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode or not lines:
            tail = "\n  ".join(done.stderr.strip().splitlines()[-4:])
            raise SystemExit(f"{self.name} failed: {' '.join(self.command)}\n  {tail}")
        facts = json.loads(lines[-1])
        self.times.append(facts["ms_per_step_median"])
        self.losses = [facts["loss0"]]
        self.rss_bytes = max(self.rss_bytes, round(facts["peak_rss_mb"] * 2**20))

    def stop(self) -> None:
        """Nothing to do: nothing stays running between rounds."""
