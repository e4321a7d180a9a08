"""`pocktvm build`: a model in, an artifact folder out; nothing to do where one is up to date."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pocktvm.cli import options
from pocktvm.cli.fingerprint import fingerprint, is_current
from pocktvm.cli.progress import Progress
from pocktvm.cli.show import show
from pocktvm.errors import PockError
from pocktvm.files import check_folder, write_whole
from pocktvm.manifest import MANIFEST, STAMP, read_manifest, sha256, summary

if TYPE_CHECKING:
    from pocktvm.ir.target import Target

Rate = Annotated[
    float | None,
    typer.Option(parser=options.rate, metavar="X", help="stored default learning rate"),
]


def build(
    model: Annotated[
        str,
        typer.Argument(help="zoo name with options, file.py:function, or file.onnx"),
    ] = "mobilenetv2",
    target: options.Target = "host",
    scheme: Annotated[
        str,
        typer.Option(help="full, last, bias:N, blocks:N, pockengine, lora:N, auto, TOML, or JSON"),
    ] = "pockengine",
    batch: options.Batch = None,
    weights: options.Weights = None,
    loss: Annotated[str | None, typer.Option(help="cross_entropy, mse, …, none")] = None,
    optimizer: Annotated[str, typer.Option(help="sgd, momentum, adam, …, with :options")] = "sgd",
    lr: Rate = None,
    budget: options.Budget = None,
    threads: Annotated[int | None, typer.Option(min=1, help="default number of threads")] = None,
    dropout: Annotated[bool, typer.Option("--dropout", help="the step drops, seeded")] = False,
    resample: Annotated[
        bool, typer.Option("--resample", help="channels that learn can be chosen while it trains")
    ] = False,
    saved: options.Saved = "float32",
    data: Annotated[Path | None, typer.Option(help="samples, for --scheme auto")] = None,
    analysis: Annotated[Path | None, typer.Option(help="table of `pocktvm scheme`")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="the artifact's folder")] = None,
    force: Annotated[bool, typer.Option(help="build even when up to date")] = False,
    as_json: options.Json = False,
) -> None:
    """Compile MODEL for a target into a folder that trains there."""
    wanted: dict[str, Any] = {
        "model": model, "scheme": scheme, "batch": batch, "loss": loss, "optimizer": optimizer,
        "lr": lr, "budget": budget, "threads": threads, "dropout": dropout,
        "analysis": analysis, "resample": resample, "saved": saved,
    }  # fmt: skip
    device = _check(target, scheme, weights, data or analysis)
    folder = out or Path("build") / device.name / model_name(model)
    files = [*_files(model, scheme, weights, data, analysis), *_records(device)]
    key = fingerprint({**wanted, "target": device}, files)
    current = not force and is_current(folder, key)
    if not current:
        check_folder(folder)
        started = time.monotonic()
        _compile(wanted, device, weights, data, folder)
        _stamp(folder, key, round(time.monotonic() - started, 2))
    facts = {**summary(folder, read_manifest(folder)), "up_to_date": current}
    if as_json:
        print(json.dumps(facts))
        return
    show(facts)
    print(f"\nup to date: {folder}" if current else f"\n{folder} in {facts['seconds']:.1f} s")


def model_name(spec: str) -> str:
    """The artifact's name, as frontend/resolve.py gives it, without importing torch."""
    if spec.endswith(".onnx"):
        return Path(spec).stem
    path, colon, function = spec.rpartition(":")
    if colon and path.endswith(".py"):
        return f"{Path(path).stem}_{function}"
    return Path(spec.partition(":")[0]).stem.lower().replace("_", "-")


def _check(target: str, scheme: str, weights: Path | None, samples: Path | None) -> Target:
    """Everything that can be refused before torch is imported."""
    from pocktvm.ir.scheme import Scheme
    from pocktvm.targets import load_target

    device = load_target(target)
    wanted = Scheme.parse(scheme)
    if samples is None and (wanted.name == "auto" or wanted.needs_data):
        raise PockError(
            f"the scheme '{wanted}' is chosen on your data: give --data F"
            + (", or --analysis FILE of `pocktvm scheme`." if wanted.name == "auto" else ".")
        )
    if weights is not None and not weights.is_file():
        raise PockError(f"no weights at {weights}: --weights takes a safetensors file")
    return device


def _files(model: str, scheme: str, *others: Path | None) -> list[Path]:
    """The user's files a build reads."""
    source = model.rpartition(":")[0] if ".py:" in model else model
    names = [source, scheme if scheme.endswith(".toml") else ""]
    names += [str(other) for other in others if other is not None]
    folders = [p for n in names if n and Path(n).is_dir() for p in sorted(Path(n).glob("*.npy"))]
    return [Path(n).resolve() for n in names if n and Path(n).is_file()] + folders


def _records(target: Target) -> list[Path]:
    """What tuning found for this target so far."""
    from pocktvm.tuning.logs import logs_dir

    return sorted((logs_dir() / target.name).glob("*.json"))


def _compile(
    wanted: dict[str, Any], target: Target, weights: Path | None, data: Path | None, folder: Path
) -> None:
    """Import, compile, write; the folder appears whole or not at all."""
    with Progress() as bar:
        bar("load the compiler")
        from pocktvm.api import compile as compile_model
        from pocktvm.autodiff.losses import parse_loss
        from pocktvm.autodiff.optimizers import parse_optimizer
        from pocktvm.data import read_data
        from pocktvm.frontend.resolve import resolve_model

        if wanted["loss"] is not None:
            parse_loss(wanted["loss"])
        optimizer = parse_optimizer(wanted["optimizer"])
        if wanted["lr"] is not None:
            optimizer.lr = wanted["lr"]
        bar("load the model")
        source = resolve_model(wanted["model"], batch=wanted["batch"], weights=weights)
        compile_model(
            source.module,
            source.example_inputs,
            target=target,
            scheme=wanted["scheme"],
            loss=wanted["loss"] or source.loss,
            optimizer=optimizer,
            budget=wanted["budget"],
            threads=wanted["threads"],
            dropout=wanted["dropout"],
            resample=wanted["resample"],
            saved=wanted["saved"],
            samples=None if data is None else read_data(data),
            analysis=wanted["analysis"],
            out=folder,
            progress=bar,
            **source.facts(),
        )


def _stamp(folder: Path, key: str, seconds: float) -> None:
    """Written last: a folder without it is built again."""
    stamp = {"key": key, "manifest": sha256(folder / MANIFEST), "seconds": seconds}
    write_whole(folder / STAMP, json.dumps(stamp) + "\n", "the build's stamp")
