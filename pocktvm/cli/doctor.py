"""`pocktvm doctor`: what this machine has, what is missing, and the command that mends it."""

from __future__ import annotations

import json
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pocktvm.cli import options
from pocktvm.cli.crash import versions
from pocktvm.deploy.doctor import Check, remote_checks
from pocktvm.deploy.ssh import parse_host
from pocktvm.errors import PockError
from pocktvm.units import format_bytes

# Versions that are known to work together; others may crash (see constraints.txt).
PINNED = {"apache-tvm": "0.27.0.post1", "apache-tvm-ffi": "0.1.14.post1", "torch": "2.13.0"}
_FREE_BYTES = 2 * 10**9


def doctor(
    ssh: Annotated[
        str | None,
        typer.Option(
            parser=lambda text: options.refuse(parse_host, text), metavar="USER@HOST",
            help="a device to look at, too",
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Check that this machine, or a device, has what it takes.

    Python, the pinned packages, the linker, ssh, emulators, compilers, disk space.
    """
    checks = [*_packages(), _linker(), _space(), _ssh(ssh is not None), *_devices(), *_gpu()]
    if ssh is not None and shutil.which("ssh"):
        checks += remote_checks(ssh)
    if as_json:
        print(json.dumps({"ok": _ok(checks), "checks": [asdict(c) for c in checks]}))
    else:
        for check in checks:
            mark = "ok " if check.ok else ("BAD" if check.needed else " - ")
            print(f"{mark} {check.name:16} {check.found}")
            if not check.ok and check.fix:
                print(f"    {'':16} {check.fix}")
    if not _ok(checks):
        raise typer.Exit(1)


def _ok(checks: list[Check]) -> bool:
    return all(c.ok for c in checks if c.needed)


def _packages() -> Iterator[Check]:
    found = versions()
    yield Check("python", sys.version_info >= (3, 11), found["python"], "use Python 3.11 or newer")
    for name, version in found.items():
        if name in ("python", "pocktvm"):
            continue
        wanted = PINNED.get(name)
        good = version != "not installed" and (not wanted or version.split("+")[0] == wanted)
        fix = f"pip install '{name}=={wanted}'" if wanted else f"pip install {name}"
        yield Check(name, good, version, fix)


def _linker() -> Check:
    from importlib.util import find_spec

    spec = find_spec("ziglang")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    program = folder / "zig" if folder else None
    good = program is not None and program.is_file()
    return Check("zig", good, str(program or "not found"), "pip install ziglang==0.17.1")


def _space() -> Check:
    free = shutil.disk_usage(Path.cwd()).free
    return Check("disk", free > _FREE_BYTES, f"{format_bytes(free)} free here", "free 2 GB")


def _ssh(needed: bool) -> Check:
    program = shutil.which("ssh")
    found = program or "not found: `pocktvm deploy` needs it"
    return Check("ssh", program is not None, found, "apt-get install openssh-client", needed)


def _devices() -> Iterator[Check]:
    """The host, and one line for each emulator that targets name."""
    from pocktvm.manifest import emulator_of
    from pocktvm.targets import list_targets, load_target

    try:
        host = load_target("host")
        what = (
            f"{host.tvm['mcpu']}, {host.isa.cores} cores, {host.isa.vector_bytes * 8}-bit vectors"
        )
        yield Check("host", True, what)
    except PockError as error:
        yield Check("host", False, platform.machine(), str(error), needed=False)
        return
    for target in list_targets():
        if not target.emulator or target.is_gpu:
            continue
        try:
            emulator_of({"emulator": target.emulator, "target": target.name})
            yield Check(target.name, True, f"builds; runs here under {target.emulator[0]}")
        except PockError as error:
            fix = str(error).splitlines()[-1].strip()
            found = "builds; not run here: " + str(error).splitlines()[0].rpartition(": ")[2]
            yield Check(target.name, False, found, fix, needed=False)


def _gpu() -> Iterator[Check]:
    """What builds for a GPU need, and what running them does."""
    from pocktvm.cli.targets import lacks_gpu
    from pocktvm.codegen.cuda import lacks_compiler
    from pocktvm.targets import load_target

    missing, fix = lacks_compiler(), "pip install nvidia-cuda-nvrtc-cu12"
    yield Check("cuda compiler", not missing, missing or "NVRTC or nvcc", fix, needed=False)
    missing = lacks_gpu(load_target("cuda"))
    found = f"builds; not run here: {missing}" if missing else "the driver is here"
    fix = "install NVIDIA's driver, or copy the artifact to a machine that has it"
    yield Check("cuda", not missing, found, fix, needed=False)
