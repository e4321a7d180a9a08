"""`pocktvm inspect`: what an artifact holds, from its manifest; every file is checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pocktvm.cli.show import show
from pocktvm.manifest import check_files, read_manifest, summary


def inspect(
    artifact: Annotated[Path, typer.Argument(help="an artifact's folder")],
    as_json: Annotated[bool, typer.Option("--json", help="one object on stdout")] = False,
) -> None:
    """Show plan, kernels and updated tensors of an artifact."""
    manifest = read_manifest(artifact)
    check_files(artifact, manifest)
    facts = summary(artifact, manifest)
    if as_json:
        print(json.dumps(facts))
    else:
        show(facts, tensors=10_000)
