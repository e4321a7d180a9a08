"""`pocktvm deploy`: put an artifact on a device over ssh, test it there, train, fetch.

Imports neither torch nor TVM.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from pocktvm.cli import options
from pocktvm.cli.progress import Progress
from pocktvm.cli.run import check_resample
from pocktvm.deploy.ssh import parse_host
from pocktvm.files import check_file
from pocktvm.manifest import check_files, manifest_inputs, read_manifest
from pocktvm.units import format_bytes

Host = Annotated[
    str,
    typer.Option(
        "--ssh", parser=lambda text: options.refuse(parse_host, text), metavar="USER@HOST",
        help="as ssh takes it; its configuration, keys and known hosts are used",
    ),
]  # fmt: skip


@dataclass(frozen=True)
class Training:
    """What to train; nothing was asked for: only put the artifact there."""

    data: Path | None
    fetch: Path | None
    flags: list[str] = field(default_factory=list)

    @property
    def wanted(self) -> bool:
        """Whether any of its options was given."""
        return bool(self.data or self.fetch or self.flags)


def deploy(
    artifact: options.Artifact,
    ssh: Host,
    data: Annotated[
        Path | None, typer.Option(help="train there on this; as `run` takes it")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="train there for N steps")] = None,
    lr: options.StepRate = None,
    threads: options.Threads = None,
    seed: options.Seed = None,
    resample: options.Resample = None,
    fetch: Annotated[Path | None, typer.Option(help="bring the checkpoint here")] = None,
    folder: Annotated[
        str | None,
        typer.Option("--dir", help="folder there; default: ~/.local/share/pocktvm/MODEL"),
    ] = None,
    rollback: Annotated[bool, typer.Option(help="back to the version before")] = False,
    as_json: options.Json = False,
) -> None:
    """Put ARTIFACT on a device, test it there; train if asked to."""
    given = {"steps": steps, "lr": lr, "threads": threads, "seed": seed, "resample": resample}
    flags = [w for k, v in given.items() if v is not None for w in (f"--{k}", str(v))]
    training = Training(data, fetch, flags)
    if rollback and training.wanted:
        raise typer.BadParameter("--rollback only switches: train with another call")
    if folder is not None and (not folder.strip() or not folder.isprintable()):
        raise typer.BadParameter("--dir is no folder's name")
    manifest = read_manifest(artifact)
    if rollback:
        facts = _roll_back(ssh, folder, manifest)
    else:
        if resample is not None:
            check_resample(manifest, data)
        check_files(artifact, manifest)
        facts = _deploy(artifact, manifest, ssh, folder, training)
    if as_json:
        print(json.dumps(facts))
    else:
        _print(facts)
    if facts.get("interrupted"):
        raise typer.Exit(130)


def _deploy(
    artifact: Path, manifest: dict[str, Any], host: str, folder: str | None, training: Training
) -> dict[str, Any]:
    from pocktvm.deploy.install import default_folder, install, pack, upload_bytes
    from pocktvm.deploy.probe import check_fits, probe

    if training.fetch is not None:
        check_file(training.fetch, "the checkpoint")
    with _device_data(training.data, manifest) as data, Progress() as bar:
        package = pack(artifact, manifest, data)
        bar("probe", host)
        device = probe(host, folder or default_folder(manifest))
        check_fits(device, manifest, artifact, upload_bytes(device, package), training.wanted)
        installed = install(device, package, bar)
        facts = {
            "host": host, "target": manifest["target"], "model": manifest["model"],
            "folder": device.folder, "version": installed.version,
            "previous": installed.previous or None,
            "switched": installed.version != device.current,
            "uploaded_bytes": installed.uploaded_bytes,
            "selftest": installed.self_test, "device": device.facts(),
        }  # fmt: skip
        if training.wanted:
            facts |= _train(bar, device, facts, package.data_name, training)
    return facts


def _train(
    bar: Progress, device: Any, facts: dict[str, Any], data_name: str, training: Training
) -> dict[str, Any]:
    from pocktvm.cli.run import show_line
    from pocktvm.deploy.train import train

    trained = train(
        device, facts["version"], training.flags, data_name=data_name, fetch=training.fetch,
        on_line=lambda line: show_line(bar, line),
    )  # fmt: skip
    return {
        **trained.result,
        "checkpoint": trained.checkpoint,
        "fetched": str(trained.fetched) if trained.fetched else None,
        "interrupted": trained.interrupted,
    }


def _roll_back(host: str, folder: str | None, manifest: dict[str, Any]) -> dict[str, Any]:
    from pocktvm.deploy.install import default_folder, rollback
    from pocktvm.deploy.probe import probe

    with Progress() as bar:
        bar("probe", host)
        device = probe(host, folder or default_folder(manifest))
        installed = rollback(device, bar)
    return {
        "host": host, "model": manifest["model"], "folder": device.folder,
        "version": installed.version, "previous": installed.previous or None, "switched": True,
        "selftest": installed.self_test, "device": device.facts(),
    }  # fmt: skip


@contextlib.contextmanager
def _device_data(data: Path | None, manifest: dict[str, Any]) -> Iterator[Path | None]:
    if data is None:
        yield None
        return
    from pocktvm.data import device_file

    with device_file(data, manifest_inputs(manifest)) as path:
        yield path


def _print(facts: dict[str, Any]) -> None:
    test = facts["selftest"]
    where = f"{facts['host']}:{facts['folder']}"
    done = "switched to" if facts["switched"] else "already there:"
    sent = facts.get("uploaded_bytes")
    amount = f", {format_bytes(sent)} sent" if sent else ""
    print(f"{where}: {done} {facts['version']}{amount}")
    print(
        f"self-test there: losses within {test.get('loss_error', float('nan')):.1e}, outputs "
        f"within {test.get('output_error', float('nan')):.1e} of the reference"
    )
    if facts["previous"]:
        print(f"--rollback goes back to {facts['previous']}")
    losses = facts.get("losses")
    if losses:
        print(
            f"{len(losses)} steps there, loss {losses[0]:.4f} -> {losses[-1]:.4f}, "
            f"{facts['step_ms_median']:.2f} ms a step"
        )
    if facts.get("checkpoint"):
        print(f"checkpoint: {facts['fetched'] or facts['host'] + ':' + facts['checkpoint']}")
    if facts.get("interrupted"):
        print("stopped early; the checkpoint holds what was done", file=sys.stderr)
