"""`pocktvm tune`: search the kernels' knobs on a machine, keep the best as records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pocktvm.cli.progress import Progress
from pocktvm.errors import PockError


def tune(
    model: Annotated[str, typer.Argument(help="as for build")] = "mobilenetv2",
    target: Annotated[str, typer.Option(help="a name of `pocktvm targets`, or a TOML")] = "host",
    scheme: Annotated[str, typer.Option(help="as for build")] = "pockengine",
    batch: Annotated[int | None, typer.Option(min=1, help="samples per step")] = None,
    weights: Annotated[Path | None, typer.Option(help="safetensors, torch's names")] = None,
    loss: Annotated[str | None, typer.Option(help="as for build")] = None,
    optimizer: Annotated[str, typer.Option(help="as for build")] = "sgd",
    runner: Annotated[
        str, typer.Option(help="local, emulated, ssh://pi@host, or rpc://host:port/key")
    ] = "local",
    trials: Annotated[int, typer.Option(min=1, help="points measured per kernel")] = 16,
    minutes: Annotated[float | None, typer.Option(min=0.01, help="stop after so long")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="threads of the local runner")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one object on stdout")] = False,
) -> None:
    """Tune MODEL's kernels for a target; a later build uses what is found.

    Kernels with a record are skipped, so a run that was stopped goes on where it was.
    """
    from pocktvm.targets import load_target
    from pocktvm.tuning.runners import open_runner

    device = load_target(target)
    if device.is_gpu:
        raise PockError(
            f"there is nothing to tune for {device.name}: the GPU's kernels have no knobs.\n"
            "  `pocktvm build` uses them as they are."
        )
    machine = open_runner(runner, device, threads)
    try:
        with Progress() as bar:
            bar("import the model")
            from pocktvm.compiler import optimised_graphs
            from pocktvm.frontend.resolve import resolve_model
            from pocktvm.tuning.records import logs_dir
            from pocktvm.tuning.tune import tunable_kernels
            from pocktvm.tuning.tune import tune as tune_kernels

            source = resolve_model(model, batch=batch, weights=weights)
            graphs = optimised_graphs(
                source.module, source.example_inputs, target=device, scheme=scheme,
                loss=loss or source.loss, optimizer=optimizer, published=source.scheme,
            )  # fmt: skip
            bar("compile the kernels once")
            kernels = tunable_kernels(graphs, device)
            if not kernels:
                raise PockError(f"no kernel of {model} has anything to tune.")

            def show(what: str, done: int, total: int, seconds: float, best: float) -> None:
                bar(what, f"{done + 1}/{total}, best {best * 1e6:.1f} us", done, total)

            summary = tune_kernels(
                kernels, device, machine, trials=trials,
                seconds=minutes * 60 if minutes is not None else None, progress=show,
            )  # fmt: skip
    finally:
        machine.close()
    facts = {
        "target": device.name,
        "model": source.name,
        "kernels": len(kernels),
        "tuned": summary.tuned,
        "hits": summary.kept,
        "improved": summary.improved,
        "left": summary.left,
        "default_ms": summary.default_seconds * 1e3,
        "tuned_ms": summary.best_seconds * 1e3,
        "records": str(logs_dir() / device.name),
    }
    if as_json:
        print(json.dumps(facts))
        return
    print(
        f"{len(kernels)} kernels: {summary.tuned} tuned now, {summary.kept} had a record, "
        f"{summary.left} left for another run.\n"
        f"{summary.improved} beat their default; their sum over a step and a prediction: "
        f"{facts['default_ms']:.2f} -> {facts['tuned_ms']:.2f} ms.\n"
        f"Records: {facts['records']}"
    )
