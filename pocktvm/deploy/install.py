"""Puts an artifact on a device: upload, verify, self-test there, and only then switch."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from pocktvm.deploy.client import client_name, is_gone
from pocktvm.deploy.failures import DeviceError, explain
from pocktvm.deploy.probe import Device
from pocktvm.deploy.ssh import Script, run_script
from pocktvm.errors import PockError
from pocktvm.manifest import MANIFEST, sha256

Progress = Callable[[str, str, int, int], None]
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Package:
    """What a deployment brings: the artifact's files with their hashes, and perhaps data."""

    artifact: Path
    hashes: Mapping[str, str]  # file name -> sha256
    data: Path | None = None
    data_hash: str = ""

    @property
    def version(self) -> str:
        """A name for the content, 16 hexadecimal digits: the same artifact is the same version."""
        return self.hashes[MANIFEST][:16]

    @property
    def data_name(self) -> str:
        """The data file's name on the device."""
        return f"{self.data_hash[:16]}.safetensors" if self.data else ""


@dataclass(frozen=True)
class Installed:
    """What an installation did.

    version         the one the device now uses
    previous        the one that a rollback would go back to; empty: none
    uploaded_bytes  sent over ssh; files that the device had are not
    self_test       what the artifact's self-test said there: `loss_error`, `output_error`
    """

    version: str
    previous: str
    uploaded_bytes: int
    self_test: Mapping[str, Any] = field(default_factory=dict)


def pack(artifact: Path, manifest: Mapping[str, Any], data: Path | None = None) -> Package:
    """Collect what the manifest names, whose files were checked. PockError: foreign names."""
    foreign = [name for name in manifest["files"] if not _NAME.fullmatch(name)]
    if foreign:
        raise PockError(
            f"{artifact / MANIFEST} names files that no build makes: {foreign[:4]}; build it again."
        )
    hashes = {
        name: str(entry["sha256"] if isinstance(entry, dict) else entry)
        for name, entry in manifest["files"].items()
    }
    hashes[MANIFEST] = sha256(artifact / MANIFEST)
    return Package(artifact, hashes, data, sha256(data) if data else "")


def default_folder(manifest: Mapping[str, Any]) -> str:
    """The model's folder on a device, under the home of the user there."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", str(manifest["model"])).strip(".-") or "model"
    return f".local/share/pocktvm/{name}"


def upload_bytes(device: Device, package: Package) -> int:
    """How much of the package is not on the device yet."""
    return sum(path.stat().st_size for _, path in _missing(device, package))


def install(device: Device, package: Package, progress: Progress) -> Installed:
    """Upload what is missing, verify, test, switch; a damaged copy there is replaced."""
    version, files = _kept_version(device, package), _missing(device, package)
    try:
        return _install(device, package, version, files, progress)
    except DeviceError as error:
        if error.kind != "damaged" or len(files) == len(_all(package)):
            raise explain(device.host, device.folder, error) from error
    try:
        return _install(device, package, None, _all(package), progress)
    except DeviceError as error:
        raise explain(device.host, device.folder, error) from error


def rollback(device: Device, progress: Progress) -> Installed:
    """Back to the version before, after its self-test. PockError: there is none."""
    heard: dict[str, str] = {}
    values = _common(device)
    try:
        run_locked(device.host, Script("rollback", values, on_event=_notes(heard, progress)))
    except DeviceError as error:
        raise explain(device.host, device.folder, error) from error
    version, _, previous = heard["done"].partition(" ")
    return Installed(version, previous, 0, _self_test(heard))


def run_locked(host: str, script: Script) -> bool:
    """run_script, and once more where what holds the lock is a deployment of ours that died."""
    try:
        return run_script(host, script)
    except DeviceError as error:
        holder = error.detail.partition(" ")[0]
        if error.kind != "busy" or not is_gone(holder):
            raise
    script.values = {**script.values, "takeover": holder}
    return run_script(host, script)


def _install(
    device: Device,
    package: Package,
    version: str | None,
    files: Sequence[tuple[str, Path]],
    progress: Progress,
) -> Installed:
    name = version or f"{package.version}-{secrets.token_hex(4)}"
    values = {
        **_common(device),
        "version": name,
        "reuse": "yes" if version else "",
        "payload": "yes" if files else "",
        "hashes": "\n".join(f"{digest}  {file}" for file, digest in package.hashes.items()),
        "data_name": package.data_name,
        "data_hash": package.data_hash,
    }
    heard: dict[str, str] = {}
    total = sum(path.stat().st_size for _, path in files)
    script = Script("install", values, on_event=_notes(heard, progress))
    if files:
        script.payload = lambda pipe: _write_tar(pipe, files, total, progress)
    run_locked(device.host, script)
    return Installed(name, heard["done"], total, _self_test(heard))


def _common(device: Device) -> dict[str, str]:
    token = secrets.token_hex(8)
    return {"folder": device.folder, "token": token, "client": client_name(), "takeover": ""}


def _notes(heard: dict[str, str], progress: Progress) -> Callable[[str, str], None]:
    def note(word: str, text: str) -> None:
        heard[word] = text
        if word == "stage":
            progress(text, "", 0, 0)

    return note


def _self_test(heard: Mapping[str, str]) -> dict[str, Any]:
    try:
        found = json.loads(heard.get("selftest", ""))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _kept_version(device: Device, package: Package) -> str | None:
    """A version with this content that is on the device, the current one first."""
    there = [v for v in device.versions if v.partition("-")[0] == package.version]
    return max(there, key=lambda v: (v == device.current, v), default=None)


def _missing(device: Device, package: Package) -> list[tuple[str, Path]]:
    has = {"artifact": _kept_version(device, package), "data": package.data_name in device.data}
    return [(n, p) for n, p in _all(package) if not has["artifact" if "/" in n else "data"]]


def _all(package: Package) -> list[tuple[str, Path]]:
    files = [(f"artifact/{name}", package.artifact / name) for name in package.hashes]
    if package.data is not None:
        files.append((package.data_name, package.data))
    return files


def _write_tar(
    pipe: IO[bytes], files: Sequence[tuple[str, Path]], total: int, progress: Progress
) -> None:
    """Stream files; owner and rights are the same whoever deploys."""
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress("upload", f"{done / 1e6:.1f} of {total / 1e6:.1f} MB", done, total)

    with tarfile.open(fileobj=pipe, mode="w|", format=tarfile.GNU_FORMAT) as tar:
        for name, path in files:
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime = path.stat().st_size, int(path.stat().st_mtime)
            entry.mode = 0o755 if path.name == "pocktvm-run" else 0o644
            with path.open("rb") as file:
                tar.addfile(entry, _Counted(file, count))


class _Counted:
    """A file that tells how much of it was read."""

    def __init__(self, file: IO[bytes], count: Callable[[int], None]) -> None:
        self._file = file
        self._count = count

    def read(self, nbytes: int = -1) -> bytes:
        """At most `nbytes` of the file, counted."""
        piece = self._file.read(nbytes)
        self._count(len(piece))
        return piece


def digest_of(nbytes: int, stream: IO[bytes], out: IO[bytes]) -> str:
    """Copy exactly `nbytes`; their sha256. Fewer where the stream ends."""
    digest = hashlib.sha256()
    while nbytes > 0:
        piece = stream.read(min(nbytes, 1 << 20))
        if not piece:
            break
        digest.update(piece)
        out.write(piece)
        nbytes -= len(piece)
    return digest.hexdigest()
