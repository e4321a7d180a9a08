"""`pocktvm run`: train with an artifact's own program, under an emulator where it is foreign.

Imports neither torch nor TVM: this process only checks the data, starts `pocktvm-run`, and passes
on what it says.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from pocktvm.cli import options
from pocktvm.cli.progress import Progress
from pocktvm.errors import InternalError, PockError
from pocktvm.files import check_file
from pocktvm.manifest import check_files, emulator_of, manifest_inputs, read_manifest

Every = Annotated[
    float | None,
    typer.Option(parser=options.seconds, metavar="TIME", help="save this often: 1s, 500ms"),
]


def run(
    artifact: options.Artifact,
    data: Annotated[Path | None, typer.Option(help="safetensors, npz, or a folder of npy")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="total, resumed steps included")] = None,
    lr: options.StepRate = None,
    threads: options.Threads = None,
    pin: Annotated[bool, typer.Option("--pin", help="each thread keeps to a core")] = False,
    save: Annotated[Path | None, typer.Option(help="checkpoint to write, at the end too")] = None,
    save_every: Every = None,
    resume: Annotated[Path | None, typer.Option(help="checkpoint to go on from")] = None,
    resample: options.Resample = None,
    seed: options.Seed = None,
    as_json: options.Json = False,
) -> None:
    """Train ARTIFACT on your data, or on one made-up batch.

    The made-up batch is the same on every device; repeated, its loss falls.
    """
    if save_every is not None and save is None:
        raise typer.BadParameter("--save-every needs --save FILE")
    manifest = read_manifest(artifact)
    if resample is not None:
        check_resample(manifest, data)
    check_files(artifact, manifest)
    emulator = emulator_of(manifest)
    _check_paths(save, resume)
    with _data_flags(data, manifest) as data_flags:
        command = [*emulator, str(artifact / "pocktvm-run"), str(artifact), *data_flags]
        command += ["--die-with-parent", *(["--emulated"] if emulator else [])]
        command += _flags(
            steps=steps, lr=lr, threads=threads, save=save, resume=resume, seed=seed,
            resample=resample,
            save_every=None if save_every is None else f"{save_every:g}s",
        )  # fmt: skip
        command += [*(["--pin"] if pin else []), *(["--json"] if as_json else [])]
        _start(command, as_json=as_json, emulated=bool(emulator))


def _flags(**values: Any) -> list[str]:
    """`--save-every 1s` and so on, for the values that were given."""
    given = [(f"--{k.replace('_', '-')}", str(v)) for k, v in values.items() if v is not None]
    return [word for pair in given for word in pair]


@contextlib.contextmanager
def _data_flags(data: Path | None, manifest: dict[str, Any]) -> Iterator[list[str]]:
    if data is None:
        yield []
        return
    from pocktvm.data import device_file

    with device_file(data, manifest_inputs(manifest)) as path:
        yield ["--data", str(path)]


def check_resample(manifest: dict[str, Any], data: Path | None) -> None:
    """PockError where --resample has nothing to choose, or no epochs to count."""
    if not any(t["kind"] == "selection" for t in manifest["tensors"].values()):
        raise PockError(
            "--resample: the channels that learn are fixed in this artifact; build it with "
            "--resample to choose them."
        )
    if data is None:
        raise PockError("--resample counts epochs: give --data")


def _check_paths(save: Path | None, resume: Path | None) -> None:
    """Refuse before any step what would fail at the first save."""
    options.check_checkpoint(resume)
    if save is not None:
        check_file(save, "the checkpoint")


def _start(command: list[str], *, as_json: bool, emulated: bool) -> None:
    """Run the trainer to its end; its exit code is ours."""
    from pocktvm.runtime.child import wait_for

    with Progress() as bar:
        code, stdout = wait_for(
            [*command, *(["--progress"] if bar.visible else [])],
            lambda line: show_line(bar, line),
        )
    if as_json and stdout:
        print(json.dumps(_facts(stdout, emulated)))
    else:
        print(stdout, end="")
    _check_code(code, command)


def show_line(bar: Progress, line: str) -> None:
    """`progress STEP TOTAL LOSS MS` moves the bar; anything else is a message."""
    words = line.split()
    if len(words) == 5 and words[0] == "progress":
        detail = f"step {words[1]}/{words[2]}  loss {float(words[3]):.4f}  {words[4]} ms"
        bar("train", detail, int(words[1]), int(words[2]))
    else:
        print(line, file=sys.stderr)


def _facts(stdout: str, emulated: bool) -> dict[str, Any]:
    """The trainer's object; memory under an emulator is the emulator's, so it is not told."""
    facts = json.loads(stdout)
    memory = [k for k in facts if "rss" in k or k == "measured_bytes"]
    return {**facts, "emulated": emulated, **({k: None for k in memory} if emulated else {})}


def _check_code(code: int, command: list[str]) -> None:
    """0 passes; a stop by the user and what the trainer complained about are not our bugs."""
    if code == 0:
        return
    stop = -code if code < 0 else code - 128
    if stop in (signal.SIGINT, signal.SIGTERM):
        raise typer.Exit(128 + stop)
    if stop == signal.SIGKILL:
        raise PockError("the trainer was killed from outside; was the memory used up?")
    if code < 0 or code > 128 or code == 3:
        how = f"exit code {code}" if code == 3 else f"signal {stop}"
        raise InternalError(f"the trainer failed ({how}): {' '.join(command)}")
    raise typer.Exit(1)
