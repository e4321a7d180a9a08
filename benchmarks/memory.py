"""Planned and measured memory of every zoo model, in full and with pockengine.

    python -m benchmarks.memory [--models mlp,resnet50] [--keep results.json] [--json]

For each: the arena, the liveness lower bound it is packed to, and what the artifact's own program
took on this machine: its peak resident set minus the resident set after open, before the arena is
touched. `--keep` adds to a file and skips what it holds, so that a stopped run goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from pocktvm import SGD
from pocktvm import compile as compile_model
from pocktvm.frontend.resolve import resolve_model
from pocktvm.models import MODELS

SCHEMES = ("full", "pockengine")
BATCH = {"resnet50": 4, "bert": 4, "distilbert": 4, "llama": 1}  # of the benchmarks; elsewhere 8
STEPS = 3


def measure(model: str, scheme: str, folder: Path, batch: int | None = None) -> dict[str, Any]:
    """Build one artifact into `folder`, train a few steps; all sizes in bytes."""
    source = resolve_model(model, batch=batch or BATCH.get(model.partition(":")[0], 8))
    artifact = compile_model(
        source.module, source.example_inputs, scheme=scheme, loss=source.loss, optimizer=SGD(),
        published=source.scheme, mean=source.mean, scale=source.scale, out=folder,
    )  # fmt: skip
    plan, command = artifact.plan, [str(folder / "pocktvm-run"), str(folder), "--json"]
    found = subprocess.run(
        [*command, "--steps", str(STEPS)], check=True, capture_output=True, text=True
    )
    return {
        "model": model,
        "scheme": scheme,
        "arena_bytes": plan.arena_bytes,
        "lower_bound_bytes": plan.lower_bound_bytes,
        "trained_bytes": plan.by_class["trained"],
        "frozen_bytes": plan.by_class["frozen"],
        "total_bytes": plan.total_bytes,
        "measured_bytes": json.loads(found.stdout)["measured_bytes"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: MB, and ratios to the bound and to the plan."""
    head = "| model | scheme | arena | over its lower bound | measured | over the arena |\n"
    head += "|---|---|---:|---:|---:|---:|\n"
    return head + "\n".join(
        f"| {r['model']} | {r['scheme']} | {r['arena_bytes'] / 1e6:.2f} MB "
        f"| {r['arena_bytes'] / r['lower_bound_bytes'] - 1:+.2%} "
        f"| {r['measured_bytes'] / 1e6:.2f} MB "
        f"| {r['measured_bytes'] / r['arena_bytes'] - 1:+.2%} |"
        for r in rows
    )


def main(argv: list[str] | None = None) -> int:
    """Parse, build and run one after the other, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS), help="zoo names, comma separated")
    parser.add_argument("--keep", type=Path, help="JSON lines: read first, added to")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    kept = options.keep
    lines = kept.read_text().splitlines() if kept and kept.exists() else []
    rows = [json.loads(line) for line in lines]
    for model in options.models.split(","):
        for scheme in SCHEMES:
            if any((r["model"], r["scheme"]) == (model, scheme) for r in rows):
                continue
            print(f"{model}, {scheme} …", file=sys.stderr)
            with tempfile.TemporaryDirectory(prefix="pocktvm-memory-") as folder:
                rows.append(measure(model, scheme, Path(folder) / "artifact"))
            if kept:
                kept.write_text("".join(json.dumps(r) + "\n" for r in rows))
    print(json.dumps(rows) if options.json else table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
