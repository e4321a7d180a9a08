"""`pocktvm report`: one self-contained HTML page about an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pocktvm.cli import options
from pocktvm.files import write_whole
from pocktvm.manifest import read_manifest, read_stamp
from pocktvm.report import report as html_report


def report(
    artifact: options.Artifact,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="default: report.html in the artifact")
    ] = None,
) -> None:
    """Write a page: the plan, its timeline, kernels, what learns."""
    manifest = read_manifest(artifact)
    page = html_report(manifest, read_stamp(artifact).get("seconds"))
    path = out or artifact / "report.html"
    write_whole(path, page, "the report")
    print(path)
