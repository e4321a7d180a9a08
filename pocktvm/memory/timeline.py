"""Live bytes call by call, small enough for the manifest; report/ draws it."""

from __future__ import annotations

from typing import Any

from pocktvm.ir.kernels import Kernels, Program, aligned
from pocktvm.ir.memory import CLASSES, MemoryPlan
from pocktvm.memory.lifetimes import CLASS_OF, PERSISTENT, in_place
from pocktvm.memory.plan import live_by_class


def timeline(kernels: Kernels, program: Program, plan: MemoryPlan) -> list[dict[str, Any]]:
    """One entry a call: its label, rule, FLOPs, and the arena's live bytes by class while it runs.

    Frozen weights are left out, they do not change. The largest entry's sum is the plan's lower
    bound when this program has the peak.
    """
    always = dict.fromkeys(CLASSES[1:], 0)
    for name, param in kernels.params.items():
        if name in plan.offsets[program.name]:
            always[CLASS_OF[param.kind]] += aligned(int(param.value.nbytes))
    for name, buffer in program.buffers.items():
        if buffer.kind in PERSISTENT and not buffer.alias_of and name not in kernels.params:
            always[CLASS_OF[buffer.kind]] += aligned(buffer.nbytes)
    blocks = in_place(program, kernels.kernels)
    entries = []
    for index, call in enumerate(program.calls):
        live = dict(always)
        for name, nbytes in live_by_class(blocks, index).items():
            live[name] += nbytes
        kernel = kernels.kernels.get(call.symbol)
        entries.append(
            {
                "call": call.label or call.symbol,
                "rule": kernel.rule if kernel else "",
                "flops": kernel.flops if kernel else 0,
                "bytes": {name: nbytes for name, nbytes in live.items() if nbytes},
            }
        )
    return entries
