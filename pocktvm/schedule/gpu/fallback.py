"""Any operator TVM can legalize: every loop nest of it is a launch, one thread an output element.

The last rule: it accepts every single node whose operator Relax knows. A nest without a parallel
axis, or one TVM wrote as a whole (a sort), is run by one thread: slow, and right.
"""

from __future__ import annotations

from typing import Any

from pocktvm.ir.target import Target
from pocktvm.schedule.gpu.launch import BLOCK
from pocktvm.schedule.rules.fallback import Fallback as CpuFallback
from pocktvm.tvm_api import Schedule, hoist_allocations, tvm

SPATIAL = 0  # IterVar's type of an axis along which elements are independent


class Fallback(CpuFallback):
    """One node, through TVM's own legalization, bound to threads."""

    def schedule(self, func: Any, target: Target) -> tuple[Any, tuple[tuple[int, str], ...]]:
        """The function with every block bound, and its temporaries as (elements, dtype)."""
        schedule = Schedule(tvm.IRModule({"main": func}))
        for block in _blocks(schedule)[:-1]:
            try:
                schedule.compute_inline(block)
            except tvm.s_tir.ScheduleError:
                continue  # a reduction, or read in a way that needs it whole
        for block in _blocks(schedule):
            _bind(schedule, block)
        return hoist_allocations(schedule.mod["main"])


def _blocks(schedule: Any) -> list[Any]:
    return list(schedule.get_child_blocks(schedule.get_sblock("root")))


def _bind(schedule: Any, block: Any) -> None:
    """Fuse the leading spatial loops and give each thread one turn of them."""
    loops = schedule.get_loops(block)
    kinds = [int(v.iter_type) for v in schedule.get(block).iter_vars]
    spatial = 0
    while len(kinds) == len(loops) and spatial < len(kinds) and kinds[spatial] == SPATIAL:
        spatial += 1
    if spatial == 0:
        outer = schedule.add_unit_loop(loops[0] if loops else block)
        schedule.bind(outer, "threadIdx.x")
        return
    fused = schedule.fuse(*loops[:spatial]) if spatial > 1 else loops[0]
    blocks, threads = schedule.split(fused, [None, BLOCK])
    schedule.bind(blocks, "blockIdx.x")
    schedule.bind(threads, "threadIdx.x")
