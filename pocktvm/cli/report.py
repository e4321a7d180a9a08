"""`pocktvm report`: one self-contained HTML page about an artifact."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from pocktvm.manifest import read_manifest, read_stamp
from pocktvm.report import report as html_report


def report(
    artifact: Annotated[Path, typer.Argument(help="an artifact's folder")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="default: report.html in the artifact")
    ] = None,
) -> None:
    """Write a page with the plan, its timeline, the kernels and what learns."""
    manifest = read_manifest(artifact)
    page = html_report(manifest, read_stamp(artifact).get("seconds"))
    path = out or artifact / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(page, encoding="utf-8")
    os.replace(part, path)
    print(path)
