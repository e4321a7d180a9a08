"""Whole training steps beside their peers, interleaved in one sitting.

    python -m benchmarks.step --workload w1a --scheme sparse --threads 1 [--json]
        [--peers torch,torch-fold_cl,tf,ort,jax] [--peers-dir DIR]

Every contestant is a process of its own with the same weights, batch, trained tensors and SGD. The
first losses must agree before anything is timed. Rounds go around all contestants, so that a
machine that drifts drifts for everyone; medians over all rounds are compared with the best peer.

torch peers run in this environment. tf, ort and jax need `--peers-dir`, a folder with their
environments and one set of weights (benchmarks/peers.py); with it everybody, ours and torch too,
has that folder's weights and batch.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.contestants import Contestant, Script, Worker
from benchmarks.peak import fma_peak_gflops
from benchmarks.peers import SCRIPTED, PeersDir, load_weights
from benchmarks.workloads import SCHEMES, WORKLOADS

TORCH = ("torch", "torch-fold_cl", "torch-compile")
SCRIPT_ROUNDS = 3  # of the --rounds: a launch costs its framework's import and first step


def main(argv: list[str] | None = None) -> int:
    """Parse, build, run, print."""
    options = _parser().parse_args(argv)
    options.peers = _peers(options)
    with tempfile.TemporaryDirectory(prefix="pocktvm-bench-") as folder:
        contestants, flops = prepare(options, Path(folder))
        peak = fma_peak_gflops(options.threads)
        sit(contestants, options)
    result = summary(options, contestants, flops, peak)
    if options.json:
        print(json.dumps(result))
    else:
        print(f"{WORKLOADS[options.workload].what}, {options.scheme}, {options.threads} thread(s)")
        _table(result, contestants)
    return 0


def sit(contestants: list[Contestant], options: argparse.Namespace) -> None:
    """Start everybody, check that they do the same work, go around."""
    try:
        for contestant in contestants:
            contestant.start(options.threads)
        check_losses(contestants)
        every = max(1, options.rounds // SCRIPT_ROUNDS)
        for number in range(options.rounds):
            for contestant in contestants:
                if isinstance(contestant, Worker) or number % every == 0:
                    contestant.round()
    finally:
        for contestant in contestants:
            contestant.stop()


def prepare(options: argparse.Namespace, folder: Path) -> tuple[list[Contestant], int]:
    """Build our artifact, write the batch and the trained names, name every command."""
    import torch

    import pocktvm
    from pocktvm.frontend.resolve import resolve_model

    workload = WORKLOADS[options.workload]
    shared = PeersDir(options.peers_dir, options.workload) if options.peers_dir else None
    scripts = {
        peer: shared.command(peer, options.scheme, options.threads)
        for peer in options.peers
        if peer in SCRIPTED
    }
    model = workload.peers_model if shared else workload.model
    source = resolve_model(model, batch=workload.batch)
    scheme, inputs = SCHEMES[options.scheme], source.example_inputs
    if shared:
        load_weights(source.module, shared.weights)
        x, labels = shared.batch()
        inputs = (torch.from_numpy(x),)
        if scheme != "full":
            scheme = dict.fromkeys(shared.trained(options.scheme), 1)
    artifact = pocktvm.compile(
        source.module, inputs, name=source.name, published=source.scheme,
        scheme=scheme, target=options.target, out=folder / "artifact",
    )  # fmt: skip
    x = inputs[0]
    if not shared:
        with torch.no_grad():
            shape = source.module.eval()(x).shape
        labels = np.random.default_rng(1).integers(0, shape[1], (shape[0], *shape[2:]))
    batch, trained = folder / "batch.npz", folder / "trained.json"
    np.savez(batch, x=x.numpy(), y=labels)
    trained.write_text(json.dumps(sorted(artifact.updated)))
    common = ["--threads", str(options.threads), "--lr", str(options.lr)]
    python = [sys.executable, "-m"]
    ours = [*python, "benchmarks.workers.ours", str(artifact.path), str(batch), *common]
    contestants: list[Contestant] = [Worker("pocktvm", ours)]
    for peer in options.peers:
        if peer in SCRIPTED:
            contestants.append(Script(peer, scripts[peer], folder=options.peers_dir))
            continue
        variant = peer.removeprefix("torch-") if peer != "torch" else "eager"
        weights = ["--weights", str(shared.weights)] if shared else []
        command = [
            *python, "benchmarks.workers.torch_peer", model, str(batch), str(trained),
            "--size", str(workload.batch), "--variant", variant, *weights, *common,
        ]  # fmt: skip
        contestants.append(Worker(peer, command))
    manifest = json.loads((artifact.path / "manifest.json").read_text())
    return contestants, sum(call["flops"] for call in manifest["timeline"]["step"])


def check_losses(contestants: list[Contestant]) -> None:
    """Refuse to compare contestants that do not do the same work."""
    first = {c.name: c.losses[0] for c in contestants}
    reference = first["pocktvm"]
    for name, loss in first.items():
        if abs(loss - reference) > 1e-3 * max(abs(reference), 0.01):
            raise SystemExit(f"step-0 losses differ: {first}; {name} does other work")


def summary(
    options: argparse.Namespace, contestants: list[Contestant], flops: int, peak: float
) -> dict:
    """The figures under the names that stay. `fraction_of_peak` counts the FLOPs of our step."""
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
        "losses": {c.name: c.losses for c in contestants},
        "peak_rss_bytes": {c.name: c.rss_bytes for c in contestants},
        "steps_timed": {c.name: len(c.times) for c in contestants},
        "gflop": flops / 1e9,
        "fma_peak_gflops": peak,
        "fraction_of_peak": flops / ours.median_ms / 1e6 / peak,
    }


def _table(result: dict, contestants: list[Contestant]) -> None:
    for c in contestants:
        ratio = c.median_ms / contestants[0].median_ms
        print(
            f"  {c.name:14} {c.median_ms:9.2f} ms  min {min(c.times):9.2f}  "
            f"{ratio:5.2f}x ours  peak {c.rss_bytes / 1e6:7.1f} MB"
        )
    print(
        f"  {result['gflop']:.2f} GFLOP a step, {result['fraction_of_peak']:.0%} of the measured "
        f"FMA peak ({result['fma_peak_gflops']:.0f} GFLOP/s)"
    )
    if result["ratio_to_best_peer"] is not None:
        print(f"  ratio to the best peer: {result['ratio_to_best_peer']:.3f}")


def _peers(options: argparse.Namespace) -> list[str]:
    """The peers asked for that know the workload; others are left out, and said on stderr."""
    asked = [peer for peer in options.peers.split(",") if peer]
    for peer in asked:
        if peer not in TORCH and peer not in SCRIPTED:
            raise SystemExit(f"no peer '{peer}': {', '.join([*TORCH, *SCRIPTED])}")
        if peer in SCRIPTED and not options.peers_dir:
            raise SystemExit(f"the peer {peer} needs --peers-dir, see benchmarks/peers.py")
    unable = [p for p in asked if p in SCRIPTED and options.workload not in SCRIPTED[p]]
    if unable:
        print(f"{', '.join(unable)}: no script for {options.workload}, left out", file=sys.stderr)
    return [peer for peer in asked if peer not in unable]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workload", choices=sorted(WORKLOADS), default="w1a")
    parser.add_argument("--scheme", choices=sorted(SCHEMES), default="sparse")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peers", default="torch,torch-fold_cl")
    parser.add_argument("--peers-dir", type=Path)
    parser.add_argument("--target", default="host")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--json", action="store_true")
    return parser


if __name__ == "__main__":
    sys.exit(main())
