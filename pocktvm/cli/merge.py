"""`pocktvm merge`: an artifact and a checkpoint as one file of weights under torch's names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pocktvm.cli import options
from pocktvm.errors import PockError
from pocktvm.files import check_file, replacing_file
from pocktvm.manifest import check_files, emulator_of, read_manifest


def merge(
    artifact: options.Artifact,
    out: Annotated[Path, typer.Option("-o", "--out", help="safetensors to write")],
    resume: Annotated[Path | None, typer.Option(help="checkpoint to merge")] = None,
    apart: Annotated[bool, typer.Option(help="LoRA's matrices alone, not merged")] = False,
    as_json: options.Json = False,
) -> None:
    """Write every weight into one file, LoRA's adapters merged.

    Names and shapes are torch's: what load_state_dict takes, trained or frozen.
    """
    from pocktvm.runtime.tensor_file import write_tensors
    from pocktvm.runtime.trainer import load

    manifest = read_manifest(artifact)
    check_files(artifact, manifest)
    emulator_of(manifest)
    options.check_checkpoint(resume)
    if apart and not manifest.get("adapters"):
        raise PockError(f"{artifact} has no adapters: build it with --scheme lora:N:r=8")
    check_file(out, "the weights")
    with load(artifact, threads=1) as trainer:
        if resume is not None:
            trainer.load(resume)
        tensors = trainer.adapters() if apart else trainer.state_dict()
    with replacing_file(out, "the weights") as part:
        write_tensors(part, tensors)
    facts = {"file": str(out), "tensors": len(tensors), "bytes": out.stat().st_size}
    print(json.dumps(facts) if as_json else f"{out}: {len(tensors)} tensors")
