"""`pocktvm targets`: what can be built for, and how each was checked."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer

from pocktvm.errors import PockError
from pocktvm.ir.target import Target
from pocktvm.manifest import emulator_of
from pocktvm.units import format_bytes

CHECKED = {
    "run": "run here",
    "emulated": "emulated (qemu), not run on the device",
    "simulated": "simulated, not run on the device",
    "inspected": "linked and inspected, not run",
}


def targets(
    as_json: Annotated[bool, typer.Option("--json", help="one object on stdout")] = False,
) -> None:
    """The devices pocktvm builds for; a device is one TOML in targets/."""
    from pocktvm.targets import list_targets

    found = list_targets()
    if as_json:
        print(json.dumps({t.name: {**_facts(t), "lacks": lacks(t)} for t in found}))
        return
    for target in found:
        isa, missing = target.isa, lacks(target)
        print(f"{target.name:12} {target.description}")
        print(
            f"{'':12} {target.tvm.get('mcpu', target.tvm['kind'])}, {isa.cores} cores, "
            f"{isa.vector_bytes * 8}-bit vectors, {format_bytes(target.memory_bytes)}"
        )
        print(f"{'':12} emits {emits(target)}; checked: {CHECKED[target.checked]}")
        if missing:
            print(f"{'':12} not run here: {missing}")


def emits(target: Target) -> str:
    """What a build leaves for this target, in a few words."""
    toolchain = target.toolchain
    format_ = "Mach-O" if "macos" in toolchain.zig_target else "ELF"
    runner = "pocktvm-run"
    if toolchain.static_runner:
        runner += " (static, the model inside)"
    elif toolchain.own_loader:
        runner += " (static, loads the library itself)"
    return f"{toolchain.library} ({format_}, {target.arch}) and {runner}"


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
    return ""


def _facts(target: Target) -> dict[str, object]:
    facts = dataclasses.asdict(target)
    facts.pop("name")
    return facts
