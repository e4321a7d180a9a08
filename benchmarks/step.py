"""Whole training steps beside their peers, interleaved in one sitting.

    python -m benchmarks.step --workload w1a --scheme sparse --threads 1 [--json]

Every contestant is a process of its own with the same weights, batch, trained tensors and SGD. The
first losses must agree before anything is timed. Rounds go around all contestants, so that a
machine that drifts drifts for everyone; medians over all rounds are compared with the best peer.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.workloads import SCHEMES, WORKLOADS

ROUND_MS = 400.0


@dataclass
class Contestant:
    """A worker process and the times it has answered."""

    name: str
    command: list[str]
    process: subprocess.Popen | None = None
    ready: dict = field(default_factory=dict)
    times: list[float] = field(default_factory=list)

    def start(self, threads: int) -> None:
        """Launch and wait for its warm-up."""
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} did not start: {' '.join(self.command)}")
        self.ready = json.loads(line)

    def run(self, steps: int) -> None:
        """Time some steps."""
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        self.times += json.loads(self.process.stdout.readline())

    def steps_a_round(self) -> int:
        """About ROUND_MS of steps, by what was seen so far."""
        return max(2, min(50, round(ROUND_MS / statistics.median(self.times))))

    @property
    def median_ms(self) -> float:
        """Median milliseconds a step."""
        return statistics.median(self.times)


def main(argv: list[str] | None = None) -> int:
    """Parse, build, run, print."""
    options = _parser().parse_args(argv)
    workload = WORKLOADS[options.workload]
    with tempfile.TemporaryDirectory(prefix="pocktvm-bench-") as folder:
        contestants = prepare(options, Path(folder))
        try:
            for contestant in contestants:
                contestant.start(options.threads)
            check_losses(contestants)
            for contestant in contestants:
                contestant.run(2)
            for contestant in contestants:
                contestant.times.clear()
                contestant.run(2)
            for _ in range(options.rounds):
                for contestant in contestants:
                    contestant.run(contestant.steps_a_round())
        finally:
            for contestant in contestants:
                if contestant.process:
                    contestant.process.kill()
    result = summary(options, contestants)
    if options.json:
        print(json.dumps(result))
    else:
        print(f"{workload.what}, {options.scheme}, {options.threads} thread(s)")
        _table(result, contestants)
    return 0


def prepare(options: argparse.Namespace, folder: Path) -> list[Contestant]:
    """Build our artifact, write the batch and the trained names, name every command."""
    import torch

    import pocktvm
    from pocktvm.frontend.resolve import resolve_model

    workload = WORKLOADS[options.workload]
    source = resolve_model(workload.model, batch=workload.batch)
    artifact = pocktvm.compile(
        source.module, source.example_inputs, name=source.name, published=source.scheme,
        scheme=SCHEMES[options.scheme], target=options.target, out=folder / "artifact",
    )  # fmt: skip
    x = source.example_inputs[0]
    with torch.no_grad():
        output = source.module.eval()(x)
    labels = np.random.default_rng(1).integers(
        0, output.shape[1], (output.shape[0], *output.shape[2:])
    )
    batch, trained = folder / "batch.npz", folder / "trained.json"
    np.savez(batch, x=x.numpy(), y=labels)
    trained.write_text(json.dumps(sorted(artifact.updated)))
    python, lr = sys.executable, str(options.lr)
    common = ["--threads", str(options.threads), "--lr", lr]
    ours = [python, "-m", "benchmarks.workers.ours", str(artifact.path), str(batch), *common]
    contestants = [Contestant("pocktvm", ours)]
    for peer in filter(None, options.peers.split(",")):
        variant = peer.removeprefix("torch-") if peer != "torch" else "eager"
        command = [
            python, "-m", "benchmarks.workers.torch_peer", workload.model, str(batch),
            str(trained), "--size", str(workload.batch), "--variant", variant, *common,
        ]  # fmt: skip
        contestants.append(Contestant(peer, command))
    return contestants


def check_losses(contestants: list[Contestant]) -> None:
    """Refuse to compare contestants that do not do the same work."""
    first = {c.name: c.ready["losses"][0] for c in contestants}
    reference = first["pocktvm"]
    for name, loss in first.items():
        if abs(loss - reference) > 1e-3 * max(abs(reference), 0.01):
            raise SystemExit(f"step-0 losses differ: {first}; {name} does other work")


def summary(options: argparse.Namespace, contestants: list[Contestant]) -> dict:
    """The figures under the names that stay."""
    ours, peers = contestants[0], contestants[1:]
    best = min((p.median_ms for p in peers), default=None)
    return {
        "workload": options.workload,
        "scheme": options.scheme,
        "threads": options.threads,
        "ours_ms": ours.median_ms,
        "peers": {p.name: p.median_ms for p in peers},
        "ratio_to_best_peer": None if best is None else ours.median_ms / best,
        "minimum_ms": {c.name: min(c.times) for c in contestants},
        "losses": {c.name: c.ready["losses"] for c in contestants},
        "peak_rss_bytes": {c.name: c.ready["rss_bytes"] for c in contestants},
        "steps_timed": {c.name: len(c.times) for c in contestants},
    }


def _table(result: dict, contestants: list[Contestant]) -> None:
    for c in contestants:
        ratio = c.median_ms / contestants[0].median_ms
        print(
            f"  {c.name:14} {c.median_ms:9.2f} ms  min {min(c.times):9.2f}  "
            f"{ratio:5.2f}x ours  peak {c.ready['rss_bytes'] / 1e6:7.1f} MB"
        )
    if result["ratio_to_best_peer"] is not None:
        print(f"  ratio to the best peer: {result['ratio_to_best_peer']:.3f}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workload", choices=sorted(WORKLOADS), default="w1a")
    parser.add_argument("--scheme", choices=sorted(SCHEMES), default="sparse")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peers", default="torch,torch-fold_cl")
    parser.add_argument("--target", default="host")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--json", action="store_true")
    return parser


if __name__ == "__main__":
    sys.exit(main())
