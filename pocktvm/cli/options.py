"""Options that commands share, and what the parser itself can refuse of them (exit code 2)."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from pocktvm.errors import PockError
from pocktvm.ir.graph import SAVED
from pocktvm.units import parse_bytes, parse_seconds


def size(text: str) -> int:
    """Bytes of `64MB` (10**6) or `64MiB` (2**20)."""
    return refuse(parse_bytes, text)


def seconds(text: str) -> float:
    """Seconds of `1s` or `500ms`."""
    return refuse(parse_seconds, text)


def rate(text: str) -> float:
    """A learning rate: finite and not negative."""
    return refuse(_rate, text)


def _rate(text: str) -> float:
    value = float(text)
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"'{text}' is no learning rate: a number of 0 or more")
    return value


def saved(text: str) -> str:
    """How activations wait for the backward pass: a name of SAVED."""
    return refuse(_saved, text)


def _saved(text: str) -> str:
    if text not in SAVED:
        raise ValueError(f"'{text}' is none of {', '.join(SAVED)}")
    return text


def refuse(parse: Callable[[str], Any], text: Any) -> Any:
    """What `parse` makes of an option; its ValueError is the parser's complaint."""
    if not isinstance(text, str):  # a default passes through the parser, too
        return text
    try:
        return parse(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def check_checkpoint(resume: Path | None) -> None:
    """PockError where --resume names no file."""
    if resume is not None and not resume.is_file():
        raise PockError(f"no checkpoint at {resume}: --resume takes what --save wrote")


Artifact = Annotated[Path, typer.Argument(help="an artifact's folder")]
Target = Annotated[str, typer.Option(help="a name of `pocktvm targets`, or a TOML")]
Batch = Annotated[int | None, typer.Option(min=1, help="samples per step")]
Weights = Annotated[Path | None, typer.Option(help="safetensors, torch's names")]
Threads = Annotated[int | None, typer.Option(min=1, help="threads of the trainer")]
Seed = Annotated[int | None, typer.Option(min=0, help="order of the samples, masks")]
Resample = Annotated[
    int | None, typer.Option(min=1, metavar="EPOCHS", help="other channels learn this often")
]
Json = Annotated[bool, typer.Option("--json", help="one object on stdout")]
Budget = Annotated[
    int | None,
    typer.Option(parser=size, metavar="SIZE", help="bound of total_bytes: 64MB, 64MiB"),
]
StepRate = Annotated[
    float | None, typer.Option(parser=rate, metavar="X", help="learning rate, per step")
]
Saved = Annotated[
    str,
    typer.Option(parser=saved, metavar="T", help="activations kept as float32, bf16 or int8"),
]
