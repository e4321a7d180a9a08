"""`pocktvm doctor --ssh`: what a device lacks for a deployment, and the command that mends it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pocktvm.deploy.probe import DISK_MARGIN, Device, probe
from pocktvm.errors import PockError
from pocktvm.units import format_bytes

FOLDER = ".local/share/pocktvm"
_LITTLE_BYTES = 64 * 10**6  # what a small model's step takes


@dataclass(frozen=True)
class Check:
    """One finding; `needed` ones fail the command."""

    name: str
    ok: bool
    found: str
    fix: str = ""
    needed: bool = True


def remote_checks(host: str) -> Iterator[Check]:
    """The connection first; without it there is nothing more to say."""
    try:
        device = probe(host, FOLDER)
    except PockError as error:
        first, *rest = str(error).splitlines()
        yield Check(host, False, first, " ".join(line.strip() for line in rest))
        return
    yield Check(host, True, f"{device.board or device.system}, {device.cores} cores")
    yield _machine(device)
    yield Check("libc", bool(device.libc), device.libc or "the device does not say", needed=False)
    yield _size("memory", device.free_bytes, _LITTLE_BYTES, "stop other programs there")
    yield _size("disk there", device.disk_bytes, DISK_MARGIN, f"free space under {device.folder}")
    fix = f"give your user the right, or deploy with --dir; on the device: mkdir -p {device.folder}"
    yield Check("folder", device.writable, device.folder, fix)
    fix = "on the device: sudo apt-get install tar coreutils grep"
    found = f"missing: {device.missing}" if device.missing else "tar, sha256sum and the rest"
    yield Check("programs", not device.missing, found, fix)
    if device.launcher:
        yield Check("launcher", True, f"POCKTVM_LAUNCHER={device.launcher}")


def _machine(device: Device) -> Check:
    from pocktvm.targets import list_targets

    found = f"{device.system} {device.machine}"
    if device.arch == "arm" and device.machine == "aarch64":
        found += ", 32-bit programs"
    fit = [t.name for t in list_targets() if (t.os, t.arch) == (device.system.lower(), device.arch)]
    if fit:
        return Check("machine", True, f"{found}: build for {' or '.join(fit)}")
    fix = "write a target file for it: copy targets/rpi4.toml"
    return Check("machine", False, f"{found}: no target that ships fits", fix)


def _size(name: str, free: int | None, wanted: int, fix: str) -> Check:
    if free is None:
        return Check(name, False, "the device does not say", needed=False)
    return Check(name, free >= wanted, f"{format_bytes(free)} free", fix)
