"""Every row of the table in docs/performance.md, one after the other.

    python -m benchmarks.sitting -o sitting.jsonl --peers-dir DIR [--rows w1a:sparse,w2:full]
        [--threads 1,2] [--rounds 6]

A row is one `python -m benchmarks.step --json` in a process of its own, so that everything in it
was measured interleaved. Rows already in the file are not run again: a sitting can be stopped and
taken up, and `--rows none` only prints. A row that fails is reported and left out. Nothing else
may run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.peers import SCRIPTED
from benchmarks.workloads import WORKLOADS

ROWS = "w1a:sparse,w1a:full,w1b:sparse,w2:sparse,w2:full,w3:sparse,w4:sparse"
# Who can be the best peer of a row: folded BN in channels_last needs convolutions, torch.compile
# gains on transformers only, JAX's convolutions take ten times the others' time.
CONVOLUTIONAL = ("torch", "torch-fold_cl", "tf", "ort")
TRANSFORMERS = ("torch", "torch-compile", "ort", "jax")
Key = tuple[str, str, int]


def main(argv: list[str] | None = None) -> int:
    """Run what is missing, print the table."""
    options = _parser().parse_args(argv)
    results = _read(options.output)
    wanted = [] if options.rows == "none" else options.rows.split(",")
    for row in wanted:
        workload, _, scheme = row.partition(":")
        if workload not in WORKLOADS:
            raise SystemExit(f"no workload '{workload}': {', '.join(WORKLOADS)}")
        for threads in map(int, options.threads.split(",")):
            key = (workload, scheme or "sparse", threads)
            if key not in results and (result := _run(key, options)):
                results[key] = result
                with options.output.open("a") as file:
                    file.write(json.dumps(result) + "\n")
    print(table(list(results.values())))
    return 0


def peers_of(workload: str, with_scripts: bool) -> list[str]:
    """The contestants of a row; those with scripts only where their environments are at hand."""
    names = TRANSFORMERS if workload in ("w3", "w4") else CONVOLUTIONAL
    return [
        n for n in names if n not in SCRIPTED or (with_scripts and workload in SCRIPTED[n])
    ]  # fmt: skip


def table(results: list[dict]) -> str:
    """Markdown. `floor`: our step's FLOPs at the peak of FMA measured in the same sitting."""
    lines = [
        "| workload | scheme | threads | pocktvm ms (min) | peers, ms | ratio to the best | "
        "floor ms | MB, ours / best peer's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        best = min(r["peers"], key=r["peers"].get) if r["peers"] else ""
        peers = ", ".join(
            f"**{n} {ms:.1f}**" if n == best else f"{n} {ms:.1f}" for n, ms in r["peers"].items()
        )
        memory = [r["peak_rss_bytes"]["pocktvm"], r["peak_rss_bytes"].get(best, 0)]
        lines.append(
            f"| {r['workload']} | {r['scheme']} | {r['threads']} | {r['ours_ms']:.1f} "
            f"({r['minimum_ms']['pocktvm']:.1f}) | {peers} | {r['ratio_to_best_peer'] or 0:.3f} | "
            f"{1e3 * r['gflop'] / r['fma_peak_gflops']:.1f} | "
            f"{memory[0] / 1e6:.0f} / {memory[1] / 1e6:.0f} |"
        )
    return "\n".join(lines)


def _read(path: Path) -> dict[Key, dict]:
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {(r["workload"], r["scheme"], r["threads"]): r for r in rows}


def _run(key: Key, options: argparse.Namespace) -> dict | None:
    workload, scheme, threads = key
    print(f"{workload} {scheme}, {threads} thread(s)", file=sys.stderr, flush=True)
    peers = ",".join(peers_of(workload, bool(options.peers_dir)))
    folder = ["--peers-dir", str(options.peers_dir)] if options.peers_dir else []
    command = [
        sys.executable, "-m", "benchmarks.step", "--json", "--workload", workload,
        "--scheme", scheme, "--threads", str(threads), "--rounds", str(options.rounds),
        "--target", options.target, "--peers", peers, *folder,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"  left out: {done.stderr.strip()[-500:]}", file=sys.stderr)
        return None
    result: dict = json.loads(done.stdout)
    print(f"  ratio {result['ratio_to_best_peer']:.3f}", file=sys.stderr, flush=True)
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-o", "--output", type=Path, required=True, help="one JSON object a line")
    parser.add_argument("--rows", default=ROWS, help="workload:scheme, by comma; none: only print")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--target", default="host")
    parser.add_argument("--peers-dir", type=Path)
    return parser


if __name__ == "__main__":
    sys.exit(main())
