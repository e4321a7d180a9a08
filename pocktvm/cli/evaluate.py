"""`pocktvm eval`: loss and accuracy of an artifact, or of a checkpoint, over a data set."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from pocktvm.cli.progress import Progress
from pocktvm.errors import PockError
from pocktvm.ir.model import Input
from pocktvm.manifest import check_files, emulator_of, manifest_inputs, read_manifest


def evaluate(
    artifact: Annotated[Path, typer.Argument(help="an artifact's folder")],
    data: Annotated[Path, typer.Option(help="safetensors, npz, or a folder of npy")],
    resume: Annotated[Path | None, typer.Option(help="checkpoint to evaluate")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="threads of the trainer")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one object on stdout")] = False,
) -> None:
    """Loss and accuracy of ARTIFACT over every sample.

    A partial last batch is padded and the padding not counted.
    """
    from pocktvm.data import check_data, read_data

    manifest = read_manifest(artifact)
    check_files(artifact, manifest)
    emulator = emulator_of(manifest)
    inputs = manifest_inputs(manifest)
    arrays = check_data(read_data(data), inputs, where=str(data), whole_batch=False)
    if resume is not None and not resume.is_file():
        raise PockError(f"no checkpoint at {resume}: --resume takes what --save wrote")
    result = _measure(artifact, arrays, inputs, manifest, resume, threads)
    result["emulated"] = bool(emulator)
    if as_json:
        print(json.dumps(result))
        return
    accuracy = "" if result["accuracy"] is None else f"  accuracy {result['accuracy']:.4f}"
    print(f"loss {result['loss']:.6f}{accuracy}  over {result['samples']} samples")


def _measure(
    artifact: Path,
    arrays: dict[str, np.ndarray],
    inputs: Sequence[Input],
    manifest: dict[str, Any],
    resume: Path | None,
    threads: int | None,
) -> dict[str, Any]:
    from pocktvm.metrics import Metrics
    from pocktvm.runtime.trainer import load

    metrics, batch = Metrics(manifest["loss"]), manifest["batch"]
    labelled = metrics.loss != "none"
    names = [i.name for i in inputs]
    samples = len(arrays[names[0]])
    if not labelled:  # one number for the whole batch: padding could not be taken out of it
        samples -= samples % batch
    if samples == 0:
        raise PockError(f"loss 'none' is evaluated in whole batches of {batch}: too few samples")
    with Progress() as bar, load(artifact, threads=threads) as trainer:
        if resume is not None:
            trainer.load(resume)
        for start in range(0, samples, batch):
            bar("evaluate", f"{start}/{samples}", start, samples)
            rows = {n: np.asarray(arrays[n][start : start + batch]) for n in names}
            real = len(rows[names[0]])
            x = [_pad(rows[n], batch) for n in (names[:-1] if labelled else names)]
            output = trainer.predict(x[0] if len(x) == 1 else tuple(x))
            if labelled:
                metrics.add(output[:real], rows[names[-1]])
            else:
                metrics.add(output, None)
    return metrics.result()


def _pad(rows: np.ndarray, batch: int) -> np.ndarray:
    """A whole batch: the last sample again and again, a value the model surely accepts."""
    missing = batch - len(rows)
    return rows if missing == 0 else np.concatenate([rows, np.repeat(rows[-1:], missing, axis=0)])
