"""Reads an artifact's manifest.json, and says whether the folder still is what was built.

Imports neither torch nor TVM: `run`, `eval` and `inspect` start from here.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pocktvm.errors import PockError
from pocktvm.ir.model import Input

MANIFEST = "manifest.json"
STAMP = "build.json"  # the command line's: what the folder was built from, and how long it took


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of an artifact folder. PockError: no folder, no manifest, a foreign one."""
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        built = sorted(str(p.parent) for p in Path("build").glob(f"*/*/{MANIFEST}"))[:10]
        there = "There are: " + ", ".join(built) if built else "There is none under build/"
        raise PockError(
            f"{folder} is no artifact (no {MANIFEST} in it). {there}.\n"
            "  `pocktvm build MODEL --target T` makes one."
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(manifest["files"], dict) or not isinstance(manifest["plan"], dict):
            raise TypeError("'files' and 'plan' are no tables")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PockError(f"{path} is damaged or not pocktvm's ({error}): build it again.") from error
    return manifest


def damaged_files(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Files of the manifest that are missing or whose sha256 differs, with the reason."""
    damaged = []
    for name, entry in manifest["files"].items():
        path, wanted = folder / name, entry["sha256"] if isinstance(entry, dict) else entry
        if not path.is_file():
            damaged.append(f"{name} (missing)")
        elif sha256(path) != wanted:
            damaged.append(f"{name} (changed)")
    return damaged


def check_files(folder: Path, manifest: Mapping[str, Any]) -> None:
    """PockError where a file is missing, truncated or changed."""
    damaged = damaged_files(folder, manifest)
    if damaged:
        raise PockError(
            f"{folder} is not as it was built: {', '.join(damaged[:8])}.\n"
            "  Copy the folder again, or build it again."
        )


def sha256(path: Path) -> str:
    """Hash of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest_inputs(manifest: Mapping[str, Any]) -> list[Input]:
    """The run-time inputs, labels last."""
    return [
        Input(
            name=entry["name"],
            shape=tuple(entry["shape"]),
            dtype=entry["dtype"],
            bound=entry.get("bound"),
            ignore_index=entry.get("ignore_index"),
            mean=tuple(entry.get("mean") or ()),
            scale=tuple(entry.get("scale") or ()),
        )
        for entry in manifest["inputs"]
    ]


_MACHINES = {"arm64": "aarch64", "amd64": "x86_64", "armv7l": "arm"}


def runs_here(manifest: Mapping[str, Any]) -> bool:
    """Whether this machine can load the artifact's library itself, as the device does."""
    machine = platform.machine().lower()
    same = manifest.get("arch", "") == _MACHINES.get(machine, machine)
    return bool(same and manifest.get("os") == platform.system().lower())


def emulator_of(manifest: Mapping[str, Any]) -> list[str]:
    """The command prefix the target's programs need on this machine; empty where native.

    PockError when the emulator or its library folder is not installed.
    """
    command = [str(part) for part in manifest.get("emulator") or ()]
    if runs_here(manifest) or not (command or manifest.get("arch")):
        return []
    target = manifest["target"]
    there = "  Copy the folder to the device and run ./pocktvm-run . there"
    if not command:
        system = {"darwin": "macOS"}.get(str(manifest.get("os")), manifest.get("os"))
        raise PockError(
            f"an artifact for {target} runs on {system} on {manifest['arch']}; no emulator is "
            f"known for it.\n{there}."
        )
    packages = " ".join(["qemu-user", *_libraries(command)])
    hint = f"{there}, or install the emulator:\n  apt-get install {packages}"
    if shutil.which(command[0]) is None:
        raise PockError(
            f"an artifact for {target} runs here under {command[0]}: not installed.\n{hint}"
        )
    for flag, value in itertools.pairwise(command):
        if flag == "-L" and not Path(value).is_dir():
            raise PockError(f"{command[0]} needs {target}'s C library in {value}: missing.\n{hint}")
    return command


def _libraries(command: list[str]) -> list[str]:
    """Debian's packages of the device's C library, for the folder after -L."""
    packages = {
        "/usr/aarch64-linux-gnu": "libc6-arm64-cross",
        "/usr/arm-linux-gnueabihf": "libc6-armhf-cross",
    }
    return [packages[word] for word in command if word in packages]


def summary(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What `build` and `inspect` report: the keys of the contract first, then more."""
    stamp = read_stamp(folder)
    kept = "target model scheme batch updated plan kernels".split()
    more = "loss optimizer lr saved rules inputs output_shape versions notices trade".split()
    return {
        **{key: manifest[key] for key in kept},
        "seconds": stamp.get("seconds", manifest.get("seconds")),
        "artifact": str(folder),
        **{key: manifest[key] for key in more if key in manifest},
    }


def read_stamp(folder: Path) -> dict[str, Any]:
    """The command line's note beside an artifact; empty where there is none."""
    try:
        stamp = json.loads((folder / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}
