"""`pocktvm targets`: what can be built for, and how each was checked."""

from __future__ import annotations

import ctypes
import dataclasses
import json

from pocktvm.cli import options
from pocktvm.errors import PockError
from pocktvm.ir.target import Target
from pocktvm.manifest import emulator_of, runs_here
from pocktvm.units import format_bytes

CHECKED = {
    "run": "run here",
    "emulated": "emulated (qemu), not run on the device",
    "simulated": "simulated, not run on the device",
    "inspected": "linked and inspected, not run",
}


def targets(
    as_json: options.Json = False,
) -> None:
    """The devices pocktvm builds for; a device is one TOML in targets/."""
    from pocktvm.targets import list_targets

    found = list_targets()
    if as_json:
        print(json.dumps({t.name: {**_facts(t), "lacks": lacks(t)} for t in found}))
        return
    for target in found:
        missing = lacks(target)
        print(f"{target.name:12} {target.description}")
        print(f"{'':12} {_machine(target)}, {format_bytes(target.memory_bytes)}")
        print(f"{'':12} emits {emits(target)}; checked: {how_checked(target)}")
        if missing:
            print(f"{'':12} not run here: {missing}")


def _machine(target: Target) -> str:
    isa = target.isa
    if target.is_gpu:
        return f"{target.tvm['arch']}, {isa.cores} multiprocessors"
    return f"{target.tvm['mcpu']}, {isa.cores} cores, {isa.vector_bytes * 8}-bit vectors"


def how_checked(target: Target) -> str:
    """What stands behind the target's numbers."""
    if target.is_gpu and target.checked == "simulated":
        return "ptxas, and a driver that replays launches on a processor; not run on a GPU"
    return CHECKED[target.checked]


def emits(target: Target) -> str:
    """What a build leaves for this target, in a few words."""
    toolchain = target.toolchain
    format_ = "Mach-O" if "macos" in toolchain.zig_target else "ELF"
    runner = "pocktvm-run"
    if toolchain.static_runner:
        runner += " (static, the model inside)"
    elif toolchain.own_loader:
        runner += " (static, loads the library itself)"
    code = f"{format_}, {target.arch}"
    if target.is_gpu:
        code += ", with " + ", ".join([*toolchain.cubins, f"PTX {toolchain.ptx}"])
    return f"{toolchain.library} ({code}) and {runner}"


def lacks(target: Target) -> str:
    """What this machine lacks to run the target's artifacts; empty: nothing."""
    facts = {k: getattr(target, k) for k in ("emulator", "arch", "os")}
    try:
        emulator_of({**facts, "target": target.name})
    except PockError as error:
        first, _, hint = str(error).partition("\n")
        reason = first.rpartition("; " if not target.emulator else ": ")[2].rstrip(".")
        if not target.emulator:
            return f"needs the device; {reason}"
        return f"{target.emulator[0]}: {reason}; {hint.splitlines()[-1].strip()}"
    return lacks_gpu(target) if target.is_gpu else ""


def lacks_gpu(target: Target) -> str:
    """What a GPU's target misses on a machine that can start its programs."""
    if target.emulator and not runs_here({"arch": target.arch, "os": target.os}):
        return f"needs the device; {target.emulator[0]} runs the program, but there is no GPU in it"
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "needs an NVIDIA GPU and its driver (libcuda.so.1)"
    return ""


def _facts(target: Target) -> dict[str, object]:
    facts = dataclasses.asdict(target)
    facts.pop("name")
    return facts
