"""`pocktvm scheme`: which tensors, and which share of each, to train under a budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pocktvm.cli import options
from pocktvm.cli.progress import Progress
from pocktvm.files import check_file, write_whole
from pocktvm.units import format_bytes

if TYPE_CHECKING:
    from pocktvm.search.auto import Found

METHODS = ("finetune", "fisher", "grad-norm")
Time = Annotated[
    float | None,
    typer.Option(parser=options.seconds, metavar="TIME", help="bound of a step's time: 20ms"),
]


def scheme(
    data: Annotated[Path, typer.Option(help="safetensors, npz, or a folder of npy")],
    model: Annotated[str, typer.Argument(help="as for build")] = "mobilenetv2",
    target: options.Target = "host",
    budget: options.Budget = None,
    step_time: Time = None,
    method: Annotated[str, typer.Option(help="finetune, fisher or grad-norm")] = "finetune",
    only: Annotated[list[str] | None, typer.Option(help="patterns: weights that may learn")] = None,
    minutes: Annotated[float, typer.Option(min=0.01, help="of trials and final together")] = 10.0,
    batch: options.Batch = None,
    weights: options.Weights = None,
    loss: Annotated[str | None, typer.Option(help="as for build")] = None,
    optimizer: Annotated[str, typer.Option(help="as for build")] = "adam",
    lr: Annotated[
        float | None, typer.Option(parser=options.rate, metavar="X", help="of the trials")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="split and order of the samples")] = 0,
    analysis: Annotated[Path | None, typer.Option(help="the table: gone on with, reused")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="scheme.toml to write")] = None,
    as_json: options.Json = False,
) -> None:
    """Measure what tensors contribute, choose what fits a budget.

    It trains on your data, on this machine. A run that was stopped goes on where it was; other
    budgets reuse the table.
    """
    if method not in METHODS:
        raise typer.BadParameter(f"--method is one of {', '.join(METHODS)}, not '{method}'")
    from pocktvm.data import read_data
    from pocktvm.targets import load_target

    device, arrays = load_target(target), read_data(data)
    for path, what in ((out, "the scheme"), (analysis, "the analysis")):
        if path is not None:
            check_file(path, what)
    with Progress() as bar:
        bar("load the compiler")
        from pocktvm.autodiff.optimizers import parse_optimizer
        from pocktvm.build import Build
        from pocktvm.frontend.resolve import resolve_model
        from pocktvm.search.auto import search
        from pocktvm.search.study import Settings

        source = resolve_model(model, batch=batch, weights=weights)
        build = Build.of(
            source.module, source.example_inputs, target=device, loss=loss or source.loss,
            optimizer=parse_optimizer(optimizer, lr), budget=budget, samples=arrays,
            analysis=analysis, **source.facts(),
        )  # fmt: skip
        settings = Settings(method, minutes, seed, only=tuple(only or ()))
        found = search(build, settings=settings, step_seconds=step_time, progress=bar, explore=True)
    _write(found, device.name, budget, out)
    facts = _facts(found, device.name, budget)
    if as_json:
        print(json.dumps(facts))
    else:
        _show(facts, out)


def _write(found: Found, target: str, budget: int | None, out: Path | None) -> None:
    """The scheme's file, whole or not at all."""
    if out is None:
        return
    from pocktvm.search.auto import to_toml

    write_whole(out, to_toml(found, target, budget), "the scheme")


def _facts(found: Found, target: str, budget: int | None) -> dict[str, Any]:
    def point(choice: Any) -> dict[str, Any]:
        return {
            "gain": choice.gain, "total_bytes": choice.cost.total_bytes,
            "arena_bytes": choice.cost.arena_bytes, "step_ms": 1e3 * found.seconds(choice),
            "bias_depth": choice.depth, "weights": dict(choice.weights),
        }  # fmt: skip

    return {
        "model": found.table.facts["model"], "target": target, "budget_bytes": budget,
        "method": found.table.facts["method"], "analysis": str(found.table.path),
        "trials": len(found.table.rows), "steps": found.table.facts["steps"],
        "chosen": point(found.choice), "plan_bytes": found.planned_bytes, "scheme": found.mapping(),
        "frontier": [point(choice) for choice in found.frontier],
        "finalists": [
            {"recipe": f.recipe, "trained_gains": f.gains, **point(f.choice)}
            for f in found.finalists
        ],
    }  # fmt: skip


def _show(facts: dict[str, Any], out: Path | None) -> None:
    print(f"{facts['model']} for {facts['target']}: {facts['trials']} trials ({facts['method']})")
    print("\nby the sum of contributions, what no other planned scheme beats (step: modelled)")
    print(f"  {'gain':>9}  {'plan':>9}  {'step':>9}  biases of  weights")
    most = float("-inf")
    for point in facts["frontier"]:  # by bytes; --json has those that are only faster, too
        mark = "*" if point == facts["chosen"] else " "
        if mark == " " and point["gain"] <= most:
            continue
        most = max(most, point["gain"])
        print(
            f"{mark} {point['gain']:9.4f}  {format_bytes(point['total_bytes']):>9}  "
            f"{point['step_ms']:6.1f} ms  {point['bias_depth']:>9}  {len(point['weights'])}"
        )
    _show_finalists(facts["finalists"])
    chosen, budget = facts["chosen"], facts["budget_bytes"]
    planned = format_bytes(facts["plan_bytes"])
    print(f"\nchosen, planned with its kernels at {planned}: the classifier,")
    print(f"  biases of {chosen['bias_depth']} blocks")
    if budget is not None and facts["plan_bytes"] > budget:
        print("  (more than the budget: a build fits it by computing again, or refuses)")
    for name, share in chosen["weights"].items():
        print(f"  {name}" + ("" if share == 1 else f"  ({share:g} of its input channels)"))
    print(f"table: {facts['analysis']}" + (f"; scheme: {out}" if out else ""))


def _show_finalists(finalists: list[dict[str, Any]]) -> None:
    print("\nfinalists, each trained as a whole (gain over the classifier alone, by round)")
    rounds = range(max((len(point["trained_gains"]) for point in finalists), default=0))
    names = "".join(f"  {f'round {place + 1}':>9}" for place in rounds)
    print(f"{names}  {'plan':>9}  biases of  weights  by")
    for point in finalists:
        told = [f"{gain:.4f}" for gain in point["trained_gains"]]
        gains = "".join(f"  {text:>9}" for text in told + [""] * (len(rounds) - len(told)))
        plan = format_bytes(point["total_bytes"])
        print(
            f"{gains}  {plan:>9}  {point['bias_depth']:>9}  "
            f"{len(point['weights']):>7}  {point['recipe']}"
        )
