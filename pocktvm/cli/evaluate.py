"""`pocktvm eval`: loss and accuracy of an artifact, or of a checkpoint, over a data set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from pocktvm.cli import options
from pocktvm.cli.progress import Progress
from pocktvm.manifest import check_files, emulator_of, manifest_inputs, read_manifest


def evaluate(
    artifact: options.Artifact,
    data: Annotated[Path, typer.Option(help="safetensors, npz, or a folder of npy")],
    resume: Annotated[Path | None, typer.Option(help="checkpoint to evaluate")] = None,
    threads: options.Threads = None,
    as_json: options.Json = False,
) -> None:
    """Loss and accuracy of ARTIFACT over every sample.

    A partial last batch is padded and the padding not counted.
    """
    from pocktvm.data import check_data, read_data
    from pocktvm.metrics import measure
    from pocktvm.runtime.trainer import load

    manifest = read_manifest(artifact)
    check_files(artifact, manifest)
    emulator = emulator_of(manifest)
    inputs = manifest_inputs(manifest)
    arrays = check_data(read_data(data), inputs, where=str(data), whole_batch=False)
    options.check_checkpoint(resume)
    with Progress() as bar, load(artifact, threads=threads) as trainer:
        if resume is not None:
            trainer.load(resume)
        result: dict[str, Any] = measure(
            trainer, arrays, progress=lambda at, of: bar("evaluate", f"{at}/{of}", at, of)
        )
    result["emulated"] = bool(emulator)
    if as_json:
        print(json.dumps(result))
        return
    accuracy = "" if result["accuracy"] is None else f"  accuracy {result['accuracy']:.4f}"
    print(f"loss {result['loss']:.6f}{accuracy}  over {result['samples']} samples")
