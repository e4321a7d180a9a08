"""`pocktvm tune`: search the kernels' knobs on a machine, keep the best as records."""

from __future__ import annotations

import json
from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pocktvm.cli import options
from pocktvm.cli.progress import Progress
from pocktvm.errors import PockError

if TYPE_CHECKING:
    from pocktvm.ir.target import Target
    from pocktvm.tuning.tune import Summary


def tune(
    model: Annotated[str, typer.Argument(help="as for build")] = "mobilenetv2",
    target: options.Target = "host",
    scheme: Annotated[str, typer.Option(help="as for build")] = "pockengine",
    batch: options.Batch = None,
    weights: options.Weights = None,
    loss: Annotated[str | None, typer.Option(help="as for build")] = None,
    optimizer: Annotated[str, typer.Option(help="as for build")] = "sgd",
    saved: options.Saved = "float32",
    runner: Annotated[
        str, typer.Option(help="local, emulated, ssh://pi@host, or rpc://host:port/key")
    ] = "local",
    trials: Annotated[int, typer.Option(min=1, help="points measured per kernel")] = 16,
    minutes: Annotated[float | None, typer.Option(min=0.01, help="stop after so long")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="threads of the local runner")] = None,
    as_json: options.Json = False,
) -> None:
    """Search faster kernels for MODEL; later builds use them.

    Kernels with a record are skipped, so a run that was stopped goes on where it was.
    """
    from pocktvm.tuning.runners import open_runner

    device = _tunable(target)
    with closing(open_runner(runner, device, threads)) as machine, Progress() as bar:
        bar("import the model")
        from pocktvm.build import Build
        from pocktvm.frontend.resolve import resolve_model
        from pocktvm.tuning.records import Records
        from pocktvm.tuning.tune import tunable_kernels
        from pocktvm.tuning.tune import tune as tune_kernels

        Records(device).check_writable()
        source = resolve_model(model, batch=batch, weights=weights)
        build = Build.of(
            source.module, source.example_inputs, target=device, scheme=scheme,
            loss=loss or source.loss, optimizer=optimizer, saved=saved, **source.facts(),
        )  # fmt: skip
        programs = build.programs()
        bar("compile the kernels once")
        kernels = tunable_kernels(programs, device)
        if not kernels:
            raise PockError(f"no kernel of {model} has anything to tune.")

        def show(what: str, done: int, total: int, seconds: float, best: float) -> None:
            bar(what, f"{done + 1}/{total}, best {best * 1e6:.1f} us", done, total)

        summary = tune_kernels(
            kernels, device, machine, trials=trials,
            seconds=minutes * 60 if minutes is not None else None, progress=show,
        )  # fmt: skip
    facts = {"target": device.name, "model": build.name, **_facts(summary, device, len(kernels))}
    print(json.dumps(facts) if as_json else _told(facts))


def _tunable(target: str) -> Target:
    """The device; PockError where its kernels have no knobs."""
    from pocktvm.targets import load_target

    device = load_target(target)
    if device.is_gpu:
        raise PockError(
            f"there is nothing to tune for {device.name}: the GPU's kernels have no knobs.\n"
            "  `pocktvm build` uses them as they are."
        )
    return device


def _facts(summary: Summary, device: Target, kernels: int) -> dict[str, Any]:
    from pocktvm.tuning.logs import logs_dir

    return {
        "kernels": kernels,
        "tuned": summary.tuned,
        "hits": summary.kept,
        "improved": summary.improved,
        "left": summary.left,
        "default_ms": summary.default_seconds * 1e3,
        "tuned_ms": summary.best_seconds * 1e3,
        "records": str(logs_dir() / device.name),
    }


def _told(facts: dict[str, Any]) -> str:
    return (
        f"{facts['kernels']} kernels: {facts['tuned']} tuned now, {facts['hits']} had a record, "
        f"{facts['left']} left for another run.\n"
        f"{facts['improved']} beat their default; their sum over a step and a prediction: "
        f"{facts['default_ms']:.2f} -> {facts['tuned_ms']:.2f} ms.\n"
        f"Records: {facts['records']}"
    )
