"""How accurate does each scheme become, and what does it cost? One task, several schemes and seeds.

    python examples/accuracy/run.py mobilenetv2-0.35 --data FOLDER --schemes full,last,auto:0.25

`auto:0.25` searches with a quarter of the arena that `full` plans, beside as many bytes for code
and frozen weights as `full` has; `auto:9MB` with a budget of so many bytes in all;
`auto:pockengine` with what that scheme's plan takes.
`resample:part.toml` draws other channels after every epoch for what that scheme trains in part, in
the memory of `part.toml`. Results are appended to a file, one line a scheme; what is there already
is not run again. The table and, where matplotlib is installed, the plot are made from that file.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from tasks import TASKS, Task

import pocktvm
from pocktvm.build import Build
from pocktvm.cli.progress import Progress
from pocktvm.experiment import table
from pocktvm.frontend.resolve import resolve_model
from pocktvm.ir.scheme import Scheme
from pocktvm.search.auto import search, to_toml
from pocktvm.search.study import Settings
from pocktvm.units import parse_bytes

RESAMPLE = "resample:"
SCHEMES = "full,last,bias:7,pockengine,lora:4:r=4,auto:0.25,auto:0.125"


def main() -> int:
    """Run what is missing, then show all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--data", type=Path, default=os.environ.get("POCKTVM_DATA"))
    parser.add_argument("--schemes", default=SCHEMES, help="separated by commas")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lrs", default="3e-4,1e-3,3e-3", help="tried on held-out samples")
    parser.add_argument("--lr-seeds", type=int, help="seeds that try every rate (all)")
    parser.add_argument("--decay", action="store_true", help="the rate falls along half a cosine")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--patience", type=int, default=2, help="epochs without a lower loss")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--limit", type=int, help="training samples")
    parser.add_argument("--tests", type=int, help="test samples")
    parser.add_argument("--minutes", type=float, default=10, help="of a search")
    parser.add_argument("--shares", default="1,0.5,0.25,0.125", help="that a search tries")
    parser.add_argument("--out", type=Path, default=Path("build/accuracy"))
    options = parser.parse_args()
    if "auto:0" in options.schemes and not options.schemes.startswith("full"):
        parser.error("auto:SHARE is a share of full's arena: put full first")
    if options.data is None or not Path(options.data).is_dir():
        parser.error("give --data FOLDER (see README.md beside this file)")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{options.task}.jsonl"
    run_missing(TASKS[options.task], options, path)
    results = {name: scored(row, TASKS[options.task].score) for name, row in read(path).items()}
    text = table(results)
    (options.out / f"{options.task}.md").write_text(text + "\n")
    print(text)
    title = f"{options.task}: {TASKS[options.task].score} on the test samples"
    plot(results, title, options.out / f"{options.task}.png")
    return 0


def run_missing(task: Task, options: argparse.Namespace, path: Path) -> None:
    """Append a line for each scheme that has none."""
    train, test = task.load(Path(options.data), options.limit)
    test = {name: array[: options.tests] for name, array in test.items()}
    weights = Path(options.data) / task.weights
    for scheme in options.schemes.split(","):
        if scheme in read(path):
            continue
        with Progress() as bar:
            artifact = compiled(task, weights, scheme, train, options, path, bar)
            result = pocktvm.evaluate(
                artifact, train, test, seeds=range(options.seeds), epochs=options.epochs,
                lrs=[float(lr) for lr in options.lrs.split(",")],
                patience=options.patience, lr_seeds=options.lr_seeds, decay=options.decay,
                resample=int(scheme.startswith(RESAMPLE)), threads=options.threads,
                progress=lambda stage, detail, s=scheme: bar(f"{s}: {stage}", detail),
            )  # fmt: skip
        line = {"scheme": scheme, **result.facts(), "updated": artifact.updated}
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{scheme}: {result.mean:.4f}", file=sys.stderr)


def compiled(
    task: Task, weights: Path, scheme: str, train: Any, options: Any, path: Path, bar: Any
) -> pocktvm.Artifact:
    """The artifact of a scheme; see the top of this file for `auto`."""
    resample, scheme = scheme.startswith(RESAMPLE), scheme.removeprefix(RESAMPLE)
    source = resolve_model(task.model, batch=task.batch, weights=weights)
    wanted: Any = scheme
    if scheme.partition(":")[0] == "auto":
        wanted = searched(task, source, scheme, train, options, path, bar)
    return pocktvm.compile(
        source.module, source.example_inputs, scheme=wanted, loss=source.loss,
        optimizer=task.optimizer, name=source.name, published=source.scheme, mean=source.mean,
        scale=source.scale, resample=resample, progress=bar,
    )  # fmt: skip


def searched(
    task: Task, source: Any, scheme: str, train: Any, options: Any, path: Path, bar: Any
) -> Scheme:
    """What the search chooses for `auto:BUDGET`; one analysis of a task serves all budgets."""
    share = scheme.partition(":")[2]
    rows = read(path)
    if share in rows:
        limit: int | None = int(rows[share]["total_bytes"])
    else:
        limit = parse_bytes(share) if share and not share[-1].isdigit() else None
    if share and limit is None:
        full = rows["full"]
        limit = int(full["total_bytes"] - (1 - float(share)) * full["arena_bytes"])
    build = Build.of(
        source.module, source.example_inputs, loss=source.loss, optimizer=task.optimizer,
        budget=limit, name=source.name, published=source.scheme, mean=source.mean,
        scale=source.scale, samples=train,
        analysis=options.out / f"{options.task}.analysis.jsonl",
    )  # fmt: skip
    shares = tuple(float(share) for share in options.shares.split(","))
    settings = Settings(minutes=options.minutes, threads=options.threads, shares=shares)
    found = search(build, settings=settings, progress=bar)
    (path.with_name(f"{options.task}-{scheme.replace(':', '-')}.toml")).write_text(
        to_toml(found, "host", limit)
    )
    return Scheme(found.mapping())


def read(path: Path) -> dict[str, Any]:
    """What was run so far, by scheme."""
    if not path.is_file():
        return {}
    return {row["scheme"]: row for row in map(json.loads, path.read_text().splitlines())}


def scored(row: dict[str, Any], score: str) -> dict[str, Any]:
    """A row with the mean and standard error of its task's score."""
    if score != "perplexity":
        return row
    found = [math.exp(run["test_loss"]) for run in row["runs"]]
    error = statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else math.nan
    return {**row, "mean": statistics.mean(found), "standard_error": error}


def plot(results: dict[str, Any], title: str, path: Path) -> None:
    """Score against memory and against time."""
    try:
        from matplotlib import pyplot
    except ImportError:
        print("no plot: pip install matplotlib", file=sys.stderr)
        return
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    columns = (("total_bytes", 1e-6, "plan, MB"), ("step_ms", 1, "step, ms"))
    for panel, (key, factor, label) in zip(panels, columns, strict=True):
        for name, row in results.items():
            error = row["standard_error"]
            panel.errorbar(row[key] * factor, row["mean"], yerr=error, fmt="o", capsize=3)
            panel.annotate(name, (row[key] * factor, row["mean"]), fontsize=7)
        panel.set_xlabel(label)
    panels[0].set_ylabel("score")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
