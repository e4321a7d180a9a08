"""What a device is and has, and whether an artifact fits it; every refusal has both numbers."""

from __future__ import annotations

import mmap
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocktvm.deploy.failures import DeviceError, explain
from pocktvm.deploy.ssh import Script, run_script
from pocktvm.errors import PockError
from pocktvm.units import format_bytes

_MACHINES = {"arm64": "aarch64", "amd64": "x86_64", "armv7l": "arm", "armv8l": "arm"}
_VERSION = re.compile(r"(\d+)\.(\d+)")
# Kept free besides what is uploaded: a full disk harms more than a deployment.
DISK_MARGIN = 8 * 10**6


@dataclass(frozen=True)
class Device:
    """What `probe` found. Sizes in bytes, None where the device does not say."""

    host: str
    folder: str
    system: str
    machine: str
    arch: str  # as in a manifest: of the programs, which may be 32-bit on a 64-bit kernel
    libc: str
    cores: int
    memory_bytes: int | None
    free_bytes: int | None
    disk_bytes: int | None
    writable: bool
    missing: str  # programs
    board: str
    launcher: str
    current: str
    previous: str
    versions: frozenset[str]
    data: frozenset[str]

    def facts(self) -> dict[str, Any]:
        """For people and for --json."""
        keys = "system machine libc cores memory_bytes free_bytes disk_bytes board launcher".split()
        return {key: getattr(self, key) for key in keys}


def probe(host: str, folder: str) -> Device:
    """Ask the device; changes nothing there. PockError: it cannot be reached."""
    facts: dict[str, str] = {}

    def note(word: str, text: str) -> None:
        key, _, value = text.partition(" ")
        if word == "fact":
            facts[key] = value.strip()

    try:
        run_script(host, Script("probe", {"folder": folder}, on_event=note))
    except DeviceError as error:
        raise explain(host, folder, error) from error
    machine = facts.get("machine", "").lower()
    arch = _MACHINES.get(machine, machine)
    if arch == "aarch64" and facts.get("bits") == "32":
        arch = "arm"
    return Device(
        host=host,
        folder=facts.get("folder", folder),
        system=facts.get("system", ""),
        machine=machine,
        arch=arch,
        libc=facts.get("libc", ""),
        cores=_number(facts.get("cores")) or 0,
        memory_bytes=_kib(facts.get("memory_kib")),
        free_bytes=_kib(facts.get("free_kib")),
        disk_bytes=_kib(facts.get("disk_kib")),
        writable=facts.get("writable") == "yes",
        missing=facts.get("missing", ""),
        board=facts.get("board", ""),
        launcher=facts.get("launcher", ""),
        current=facts.get("current", ""),
        previous=facts.get("previous", ""),
        versions=frozenset(facts.get("versions", "").split()),
        data=frozenset(facts.get("data", "").split()),
    )


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdigit() else None


def _kib(text: str | None) -> int | None:
    number = _number(text)
    return None if number is None else number << 10


def check_fits(
    device: Device, manifest: Mapping[str, Any], artifact: Path, upload_bytes: int, train: bool
) -> None:
    """PockError that lists everything in the way; nothing was changed on the device."""
    checkpoint = 2 * int(manifest["plan"].get("persistent_bytes") or 0) if train else 0
    found = [
        _tools(device),
        _architecture(device, manifest),
        _libc(device, manifest, artifact),
        _memory(device, manifest),
        _disk(device, upload_bytes + checkpoint),
    ]
    problems = [problem for problem in found if problem]
    if problems:
        board = f" ({device.board})" if device.board else ""
        raise PockError(
            f"{artifact} cannot go to {device.host}{board}; nothing was changed there:\n"
            + "\n".join(f"  {problem}" for problem in problems)
        )


def _tools(device: Device) -> str:
    if not device.missing:
        return ""
    return (
        f"programs: {device.missing} missing there\n"
        "    sudo apt-get install tar coreutils grep, on the device"
    )


def _architecture(device: Device, manifest: Mapping[str, Any]) -> str:
    wanted, system = str(manifest.get("arch", "")), str(manifest.get("os", "linux"))
    if wanted == device.arch and system == device.system.lower():
        return ""
    bits = " with 32-bit programs" if device.arch == "arm" and device.machine == "aarch64" else ""
    return (
        f"architecture: built for {system} {wanted} (target {manifest['target']}), the device is "
        f"{device.system} {device.machine}{bits}\n    {fitting_targets(device, 'pocktvm build')}"
    )


def fitting_targets(device: Device, command: str) -> str:
    """What to say instead, where a target does not fit the device."""
    from pocktvm.targets import list_targets

    try:
        here = (device.system.lower(), device.arch)
        # a GPU is not asked for: whoever has one knows the target's name
        fit = [t.name for t in list_targets() if (t.os, t.arch) == here and not t.is_gpu]
    except PockError:  # the host cannot be detected here
        fit = []
    if not fit:
        return "no target that ships fits it: write a TOML of your own (targets/rpi4.toml)"
    return f"{command} MODEL --target {' or '.join(fit)}"


def _libc(device: Device, manifest: Mapping[str, Any], artifact: Path) -> str:
    if manifest.get("static_runner") or manifest.get("os") != "linux":
        return ""
    wanted, has = needed_glibc(artifact), _VERSION.search(device.libc)
    if "glibc" in device.libc.lower() or "gnu libc" in device.libc.lower():
        if has is None or (int(has[1]), int(has[2])) >= wanted:
            return ""
    elif "musl" not in device.libc.lower():
        return ""  # it does not say: the self-test will
    return (
        f"C library: needs glibc {wanted[0]}.{wanted[1]} or newer, the device has {device.libc}\n"
        "    Update its system, or build with a target file whose zig_target names that version."
    )


def needed_glibc(artifact: Path) -> tuple[int, int]:
    """The newest glibc that the artifact's programs name symbols of."""
    newest = (2, 0)
    for name in ("pocktvm-run", "model.so"):
        path = artifact / name
        if not path.is_file() or not path.stat().st_size:
            continue
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            for match in re.finditer(rb"GLIBC_(\d+)\.(\d+)", text):
                newest = max(newest, (int(match[1]), int(match[2])))
    return newest


def _memory(device: Device, manifest: Mapping[str, Any]) -> str:
    needed, free = int(manifest["plan"]["total_bytes"]), device.free_bytes
    if free is None or needed <= free:
        return ""
    total = f" of {format_bytes(device.memory_bytes)}" if device.memory_bytes else ""
    return (
        f"memory: the plan needs {format_bytes(needed)}, {format_bytes(free)}{total} is free\n"
        f"    Stop other programs there, or build with --budget {free // 10**6}MB, a smaller "
        "--batch, or a sparser --scheme."
    )


def _disk(device: Device, needed: int) -> str:
    if not device.writable:
        return (
            f"folder: {device.folder} cannot be written\n"
            "    Give your user the right, or name another folder with --dir."
        )
    free = device.disk_bytes
    if free is None or needed + DISK_MARGIN <= free:
        return ""
    return (
        f"disk: needs {format_bytes(needed + DISK_MARGIN)} under {device.folder}, "
        f"{format_bytes(free)} is free\n    Free some space, or name another folder with --dir."
    )
