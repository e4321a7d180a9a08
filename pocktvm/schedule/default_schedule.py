"""A schedule for any legalized operator: inline what is elementwise, share the outer axes.

Temporaries become arguments of the function, so that the memory plan counts them and no step
allocates; TVM would otherwise call the heap from inside the kernel.
"""

from __future__ import annotations

from typing import Any

from pocktvm.ir.target import Target
from pocktvm.tvm_api import Schedule, hoist_allocations, tvm

# Below this many scalar operations a parallel region costs more than it saves.
SERIAL_WORK = 65536


def schedule_prim_func(func: Any, target: Target) -> tuple[Any, tuple[tuple[int, str], ...]]:
    """The function with every block scheduled, and its temporaries as (elements, dtype)."""
    schedule = Schedule(tvm.IRModule({"main": func}))
    _inline(schedule)
    for block in _blocks(schedule):
        _parallelise(schedule, block, target)
    return hoist_allocations(schedule.mod["main"])


def _blocks(schedule: Any) -> list[Any]:
    root = schedule.get_sblock("root")
    return list(schedule.get_child_blocks(root))


def _inline(schedule: Any) -> None:
    """Inline elementwise producers; a block that cannot be inlined stays as it is."""
    for block in _blocks(schedule)[:-1]:
        if _is_spatial(schedule, block):
            try:
                schedule.compute_inline(block)
            except tvm.s_tir.ScheduleError:
                continue


def _is_spatial(schedule: Any, block: Any) -> bool:
    return all(int(v.iter_type) == 0 for v in schedule.get(block).iter_vars)


def _parallelise(schedule: Any, block: Any, target: Target) -> None:
    """Fuse the leading spatial loops and run them in parallel; vectorise a spatial last loop."""
    loops = schedule.get_loops(block)
    kinds = [int(v.iter_type) for v in schedule.get(block).iter_vars]
    if len(loops) != len(kinds) or not loops:
        return
    extents = [int(schedule.get(loop).extent) for loop in loops]
    spatial = 0
    while spatial < len(kinds) and kinds[spatial] == 0:
        spatial += 1
    work = 1
    for extent in extents:
        work *= extent
    if spatial == 0:
        return
    if spatial == len(kinds) and extents[-1] >= target.isa.lanes > 1:
        _, inner = schedule.split(loops[-1], [None, target.isa.lanes])
        schedule.vectorize(inner)
        spatial -= 1
    if spatial and work >= SERIAL_WORK:
        fused = schedule.fuse(*loops[:spatial]) if spatial > 1 else loops[0]
        schedule.parallel(fused)
