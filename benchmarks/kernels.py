"""Where a step's time goes: every kernel of a build, with its rate.

    python -m benchmarks.kernels --workload w1a --scheme sparse [--threads 1] [--top 30] [--json]

The artifact times its own kernels (`pocktvm-run --profile`); the build says what each does. Rates
are compared with the fastest kernel of the same run, which on a CPU is close to the FMA peak that
the machine gives this process. Kernels without counted FLOPs are listed by time alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.workloads import SCHEMES, WORKLOADS


def profile(workload: str, scheme: str, threads: int, steps: int, folder: Path) -> dict:
    """Build and run; rows of {label, rule, ms, gflops, share}."""
    import pocktvm
    from pocktvm.frontend.resolve import resolve_model

    work = WORKLOADS[workload]
    source = resolve_model(work.model, batch=work.batch)
    artifact = pocktvm.compile(
        source.module, source.example_inputs, name=source.name, published=source.scheme,
        scheme=SCHEMES[scheme], out=folder / "artifact",
    )  # fmt: skip
    command = [artifact.path / "pocktvm-run", artifact.path, "--steps", str(steps), "--threads",
               str(threads), "--profile", "--json"]  # fmt: skip
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True)
    facts = json.loads(done.stdout.splitlines()[-1])
    manifest = json.loads((artifact.path / "manifest.json").read_text())
    calls = manifest["timeline"]["step"]
    rows = [
        {
            "kernel": label,
            "rule": call["rule"],
            "ms": ms,
            "gflops": call["flops"] / ms / 1e6 if call["flops"] and ms else None,
        }
        for (label, ms), call in zip(facts["profile"], calls, strict=True)
    ]
    return {
        "workload": workload, "scheme": scheme, "threads": threads,
        "step_ms_median": facts["step_ms_median"], "kernels": rows,
        "flops": sum(call["flops"] for call in calls),
    }  # fmt: skip


def by_rule(rows: list[dict]) -> list[tuple[str, float, int]]:
    """(rule, milliseconds, calls), longest first."""
    totals: dict[str, list[float]] = {}
    for row in rows:
        totals.setdefault(row["rule"], []).append(row["ms"])
    return sorted(((r, sum(ms), len(ms)) for r, ms in totals.items()), key=lambda t: -t[1])


def show(result: dict, top: int) -> None:
    """The table for people."""
    rows = result["kernels"]
    total = sum(row["ms"] for row in rows)
    best = max((row["gflops"] or 0.0 for row in rows if row["ms"] > 0.02), default=0.0) or 1.0
    print(
        f"{result['workload']} {result['scheme']}, {result['threads']} thread(s): "
        f"{result['step_ms_median']:.2f} ms a step, kernels {total:.2f} ms, "
        f"{result['flops'] / 1e9:.2f} GFLOP, fastest kernel {best:.0f} GFLOP/s"
    )
    for rule, ms, calls in by_rule(rows):
        print(f"  {rule:24} {ms:8.3f} ms  {ms / total:6.1%}  {calls:4d} calls")
    print(f"the {top} longest")
    for row in sorted(rows, key=lambda r: -r["ms"])[:top]:
        rate = f"{row['gflops']:6.1f} GF/s {row['gflops'] / best:5.0%}" if row["gflops"] else ""
        print(f"  {row['ms']:8.3f} ms {row['ms'] / total:6.1%} {rate:18} {row['kernel'][:70]}")


def main(argv: list[str] | None = None) -> int:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workload", choices=sorted(WORKLOADS), default="w1a")
    parser.add_argument("--scheme", choices=sorted(SCHEMES), default="sparse")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--top", type=int, default=30)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="pocktvm-bench-") as folder:
        result = profile(
            options.workload, options.scheme, options.threads, options.steps, Path(folder)
        )
    if options.json:
        print(json.dumps(result))
        return 0
    show(result, options.top)
    return 0


if __name__ == "__main__":
    sys.exit(main())
