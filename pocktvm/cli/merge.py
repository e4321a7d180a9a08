"""`pocktvm merge`: an artifact and a checkpoint as one file of weights under torch's names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pocktvm.errors import PockError
from pocktvm.manifest import check_files, emulator_of, read_manifest


def merge(
    artifact: Annotated[Path, typer.Argument(help="an artifact's folder")],
    out: Annotated[Path, typer.Option("-o", "--out", help="safetensors to write")],
    resume: Annotated[Path | None, typer.Option(help="checkpoint to merge")] = None,
    apart: Annotated[bool, typer.Option(help="LoRA's matrices alone, not merged")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one object on stdout")] = False,
) -> None:
    """Write every weight, trained or frozen, adapters merged, for torch's load_state_dict."""
    from pocktvm.runtime.tensor_file import write_tensors
    from pocktvm.runtime.trainer import load

    manifest = read_manifest(artifact)
    check_files(artifact, manifest)
    emulator_of(manifest)
    if resume is not None and not resume.is_file():
        raise PockError(f"no checkpoint at {resume}: --resume takes what --save wrote")
    if apart and not manifest.get("adapters"):
        raise PockError(f"{artifact} has no adapters: build it with --scheme lora:N:r=8")
    if not out.parent.is_dir():
        raise PockError(f"no folder {out.parent} to write {out.name} to")
    with load(artifact, threads=1) as trainer:
        if resume is not None:
            trainer.load(resume)
        tensors = trainer.adapters() if apart else trainer.state_dict()
    part = out.with_name(out.name + ".part")
    write_tensors(part, tensors)
    part.replace(out)
    facts = {"file": str(out), "tensors": len(tensors), "bytes": out.stat().st_size}
    print(json.dumps(facts) if as_json else f"{out}: {len(tensors)} tensors")
