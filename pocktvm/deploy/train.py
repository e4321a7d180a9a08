"""Trains a deployed version, shows its progress, and brings its checkpoint back."""

from __future__ import annotations

import contextlib
import io
import json
import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pocktvm.deploy.client import client_name
from pocktvm.deploy.failures import DeviceError, explain
from pocktvm.deploy.install import digest_of, run_locked
from pocktvm.deploy.probe import Device
from pocktvm.deploy.ssh import Script
from pocktvm.errors import PockError


@dataclass
class Trained:
    """The trainer's own report, and where the checkpoint lies."""

    result: dict[str, Any]
    checkpoint: str  # on the device
    fetched: Path | None
    interrupted: bool


def train(
    device: Device,
    version: str,
    flags: Sequence[str],
    *,
    data_name: str = "",
    fetch: Path | None = None,
    on_line: Callable[[str], None],
) -> Trained:
    """Run pocktvm-run with `flags` on the device; `on_line` gets its stderr.

    The checkpoint stays on the device and, with `fetch`, replaces that file here once its bytes
    have the hash the device told. PockError: the trainer or the connection failed.
    """
    receiver = _Receiver(fetch)
    heard: dict[str, str] = {}
    values = {
        "folder": device.folder,
        "token": secrets.token_hex(8),
        "client": client_name(),
        "takeover": "",
        "version": version,
        "data_name": data_name,
        "fetch": "yes" if fetch else "",
    }
    script = Script(
        "train", values, flags, hold=True, on_line=on_line, on_file=receiver.take,
        on_event=lambda word, text: heard.__setitem__(word, text),
    )  # fmt: skip
    try:
        interrupted = run_locked(device.host, script)
    except DeviceError as error:
        raise explain(device.host, device.folder, error) from error
    finally:
        receiver.drop()
    return Trained(receiver.result, heard["done"], receiver.keep(device), interrupted)


class _Receiver:
    """Files that the script sends: the result in memory, the checkpoint beside its place."""

    def __init__(self, fetch: Path | None) -> None:
        self.result: dict[str, Any] = {}
        self._fetch = fetch
        self._whole = False
        self._part = None if fetch is None else fetch.with_name(f".{fetch.name}.{os.getpid()}.part")

    def take(self, name: str, nbytes: int, wanted: str, stream: IO[bytes]) -> None:
        """Read one file of `nbytes` from the script's stdout."""
        if name == "checkpoint" and self._part is not None:
            with self._part.open("wb") as out:
                self._whole = digest_of(nbytes, stream, out) == wanted
                out.flush()
                os.fsync(out.fileno())
            return
        text = io.BytesIO()
        digest_of(nbytes, stream, text)
        with contextlib.suppress(ValueError):
            self.result = json.loads(text.getvalue())

    def drop(self) -> None:
        """Remove what did not arrive whole."""
        if self._part is not None and not self._whole:
            self._part.unlink(missing_ok=True)

    def keep(self, device: Device) -> Path | None:
        """Move the checkpoint to its place. PockError when its bytes are not what was sent."""
        if self._fetch is None or self._part is None:
            return None
        if not self._whole:
            raise PockError(
                f"the checkpoint did not arrive whole; {self._fetch} is unchanged.\n"
                f"  It lies on the device: scp '{device.host}:{device.folder}/checkpoint"
                f".safetensors' {self._fetch}"
            )
        self._part.replace(self._fetch)
        with contextlib.suppress(OSError):  # not every file system can
            folder = os.open(self._fetch.absolute().parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
        return self._fetch
