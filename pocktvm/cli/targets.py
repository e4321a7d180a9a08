"""`pocktvm targets`: what can be built for, and how each was checked."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer

from pocktvm.ir.target import Target
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
        print(json.dumps({t.name: _facts(t) for t in found}))
        return
    for target in found:
        isa = target.isa
        print(f"{target.name:10} {target.description}")
        print(
            f"{'':10} {target.tvm.get('mcpu', target.tvm['kind'])}, {isa.cores} cores, "
            f"{isa.vector_bytes * 8}-bit vectors, {format_bytes(target.memory_bytes)}; "
            f"checked: {CHECKED[target.checked]}"
        )


def _facts(target: Target) -> dict[str, object]:
    facts = dataclasses.asdict(target)
    facts.pop("name")
    return facts
