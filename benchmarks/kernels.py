"""Where a step's time goes: every kernel of a build against its roofline, and against torch.

    python -m benchmarks.kernels --workload w1a --scheme sparse [--threads 1] [--torch] [--top 30]

The artifact times its own kernels (`pocktvm-run --profile`). A kernel's roofline is the longer of
its multiply-adds at the measured FMA peak and its operands at the measured rate of reading memory,
each counted once; what lies in a cache, or is computed by Winograd, may go above it. `--torch` adds
what torch takes for the same operators (benchmarks/torch_kernels.py).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.peak import fma_peak_gflops, read_gbytes
from benchmarks.workloads import SCHEMES, WORKLOADS


def profile(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Build and run; a row for every kernel of the step, in order."""
    import pocktvm
    from pocktvm.build import Build
    from pocktvm.frontend.resolve import resolve_model

    work = WORKLOADS[options.workload]
    source = resolve_model(work.model, batch=work.batch)
    what = {"name": source.name, "published": source.scheme, "scheme": SCHEMES[options.scheme]}
    artifact = pocktvm.compile(
        source.module, source.example_inputs, out=folder / "artifact", **what
    )
    command = [artifact.path / "pocktvm-run", artifact.path, "--steps", str(options.steps),
               "--threads", str(options.threads), "--profile", "--json"]  # fmt: skip
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True)
    facts = json.loads(done.stdout.splitlines()[-1])
    build = Build.of(source.module, source.example_inputs, **what)
    rows = measured(facts["profile"], build, options.threads if options.torch else None)
    peak, read = fma_peak_gflops(options.threads), read_gbytes(options.threads)
    for row in rows:
        row["roofline_ms"] = max(row["flops"] / peak / 1e6, row["bytes"] / read / 1e6)
        row["gflops"] = row["flops"] / row["ms"] / 1e6 if row["flops"] and row["ms"] else None
    return {
        "workload": options.workload, "scheme": options.scheme, "threads": options.threads,
        "step_ms_median": facts["step_ms_median"], "kernels": rows,
        "flops": sum(row["flops"] for row in rows),
        "fma_peak_gflops": peak, "read_gbytes": read,
    }  # fmt: skip


def measured(profile: list, build: Any, torch_threads: int | None = None) -> list[dict[str, Any]]:
    """What was timed, with the work and the bytes of each call; with torch's time where its
    threads are given."""
    from pocktvm.autodiff.differentiate import differentiate
    from pocktvm.passes import run_passes
    from pocktvm.schedule import schedule

    model, updated = build.resolve()
    step, _ = differentiate(model, updated, build.loss, build.optimizer)
    step = run_passes(step, build.target)
    kernels = schedule((step,), build.target, compiler=_with_records(build))
    program = kernels.programs["step"]
    rows = []
    torch = None
    if torch_threads:
        from benchmarks.torch_kernels import TorchKernels

        torch = TorchKernels(step, torch_threads)
    for (label, ms), call in zip(profile, program.calls, strict=True):
        if label != call.label:
            raise SystemExit(f"the profile has '{label}' where the build has '{call.label}'")
        kernel = kernels.kernels[call.symbol]
        touched = {program.root(name) for name in call.args[: call.n_inputs + call.n_outputs]}
        rows.append(
            {
                "kernel": label, "rule": kernel.rule, "ms": ms, "flops": kernel.flops,
                "bytes": sum(program.buffers[name].nbytes for name in touched),
            }
        )  # fmt: skip
        if torch is not None:
            made = call.args[call.n_inputs : call.n_inputs + call.n_outputs]
            rows[-1]["torch_ms"] = torch.milliseconds(made)
    return rows


def _with_records(build: Any) -> Any:
    from pocktvm.schedule.compile_kernel import KernelCompiler
    from pocktvm.tuning.records import Records

    return KernelCompiler(knobs_for=Records(build.target).knobs)


def by_rule(rows: list[dict]) -> list[tuple[str, list[dict]]]:
    """(rule, its kernels), the longest first."""
    found: dict[str, list[dict]] = {}
    for row in rows:
        found.setdefault(row["rule"], []).append(row)
    return sorted(found.items(), key=lambda item: -sum(row["ms"] for row in item[1]))


def show(result: dict, top: int) -> None:
    """The table for people."""
    rows = result["kernels"]
    total = sum(row["ms"] for row in rows)
    print(
        f"{result['workload']} {result['scheme']}, {result['threads']} thread(s): "
        f"{result['step_ms_median']:.2f} ms a step, kernels {total:.2f} ms, "
        f"{result['flops'] / 1e9:.2f} GFLOP; FMA peak {result['fma_peak_gflops']:.0f} GFLOP/s, "
        f"memory {result['read_gbytes']:.0f} GB/s"
    )
    print(f"{'ms':>10} {'of step':>8} {'GFLOP/s':>8} {'roofline':>9} {'torch ms':>9}")
    for rule, members in by_rule(rows):
        print(f"{_line(_sum(members), total)}  {rule}, {len(members)} calls")
    print(f"the {top} longest")
    for row in sorted(rows, key=lambda r: -r["ms"])[:top]:
        print(f"{_line(row, total)}  {row['kernel'][:70]}")


def _sum(rows: list[dict]) -> dict:
    """A row that stands for several; torch's time only where every one has it."""
    keys = ("ms", "flops", "bytes", "roofline_ms")
    found = {key: sum(row[key] for row in rows) for key in keys}
    found["gflops"] = found["flops"] / found["ms"] / 1e6 if found["flops"] else None
    torch = [row.get("torch_ms") for row in rows]
    return {**found, "torch_ms": None if None in torch else sum(torch)}


def _line(row: dict, total: float) -> str:
    rate = f"{row['gflops']:8.1f}" if row["gflops"] else " " * 8
    roof = f"{row['roofline_ms'] / row['ms']:9.0%}" if row["ms"] else " " * 9
    torch = f"{row['torch_ms']:9.3f}" if row.get("torch_ms") is not None else " " * 9
    return f"{row['ms']:10.3f} {row['ms'] / total:8.1%} {rate} {roof} {torch}"


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", choices=sorted(WORKLOADS), default="w1a")
    parser.add_argument("--scheme", choices=sorted(SCHEMES), default="sparse")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--torch", action="store_true", help="time torch's same operators as well")
    parser.add_argument("--top", type=int, default=30)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="pocktvm-bench-") as folder:
        result = profile(options, Path(folder))
    if options.json:
        print(json.dumps(result))
        return 0
    show(result, options.top)
    return 0


if __name__ == "__main__":
    sys.exit(main())
