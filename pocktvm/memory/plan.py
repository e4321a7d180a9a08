"""Offsets for every buffer of both programs in one arena.

    [0, persistent)          trained tensors, optimizer state, scalars: the same in both programs
    [persistent, arena)      everything else; a step and a predict never run at the same time, so
                             each has the whole of it

Frozen weights stay in the library's read-only pages and cost no arena. Where the device has a fast
memory, the arena's end lies there (memory/fast.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pocktvm.errors import InternalError
from pocktvm.ir.kernels import ALIGN, Kernels, Program, aligned
from pocktvm.ir.memory import CLASSES, MemoryPlan
from pocktvm.memory.fast import choose_fast
from pocktvm.memory.lifetimes import CLASS_OF, PERSISTENT, Block, in_place
from pocktvm.memory.pack import live_bytes, pack


@dataclass(frozen=True)
class _Packed:
    program: Program
    blocks: list[Block]
    main: dict[int, int]  # index of a block -> offset behind what is persistent
    fast: dict[int, int]  # … in the fast memory
    height: int  # of the main memory
    fast_bytes: int  # used of the fast memory
    live: np.ndarray  # bytes; index 0 is before the first call

    @property
    def peak(self) -> int:
        return int(self.live.max())

    @property
    def peak_at(self) -> int:
        """Index of the call where most bytes are live."""
        return int(self.live.argmax()) - 1


def plan(kernels: Kernels, fast_memory_bytes: int = 0) -> MemoryPlan:
    """Place every root buffer that is not frozen. Offsets are multiples of 64 bytes; at most
    `fast_memory_bytes` at the arena's end are to lie in the device's fast memory."""
    kept, persistent_bytes, persistent_class = _persistent(kernels)
    packed = [_pack(program, kernels, fast_memory_bytes) for program in kernels.programs.values()]
    height = max((p.height for p in packed), default=0)
    fast = max((p.fast_bytes for p in packed), default=0)
    bound = max((p.peak for p in packed), default=0)
    worst = max(packed, key=lambda p: p.peak, default=None)
    arena = persistent_bytes + height + fast
    frozen = sum(int(array.nbytes) for array in kernels.consts.values())
    by_class = dict.fromkeys(CLASSES, 0) | persistent_class | {"frozen": frozen}
    if worst is not None:
        for name, nbytes in live_by_class(worst.blocks, worst.peak_at).items():
            by_class[name] += nbytes
    # What packing and the other program's smaller peak leave over: the classes sum to the arena.
    by_class["workspace"] += height + fast - bound
    return MemoryPlan(
        arena_bytes=arena,
        persistent_bytes=persistent_bytes,
        lower_bound_bytes=persistent_bytes + bound,
        total_bytes=arena + frozen + sum(len(k.object) for k in kernels.kernels.values()),
        offsets={p.program.name: kept | _offsets(p, persistent_bytes, height) for p in packed},
        fast_bytes=fast,
        by_class=by_class,
        peak_call=_label(worst) if worst is not None else "",
    )


def live_by_class(blocks: list[Block], call: int) -> dict[str, int]:
    """Bytes of transient memory per class while `call` runs; a block computed in place counts for
    what it holds afterwards."""
    counts: dict[str, int] = {}
    for block in blocks:
        if block.start <= call <= block.end:
            name = block.at(call).memory_class
            counts[name] = counts.get(name, 0) + block.nbytes
    return counts


def _persistent(kernels: Kernels) -> tuple[dict[str, int], int, dict[str, int]]:
    """Offsets of what outlives a step, their end, and bytes per class."""
    kinds = {name: (param.kind, int(param.value.nbytes)) for name, param in kernels.params.items()}
    for program in kernels.programs.values():
        for name, buffer in program.buffers.items():
            if buffer.kind in PERSISTENT and buffer.alias_of is None:
                known = kinds.setdefault(name, (buffer.kind, buffer.nbytes))
                if known[1] != buffer.nbytes:
                    raise InternalError(
                        f"{program.name}: '{name}' has {buffer.nbytes} bytes, elsewhere {known[1]}"
                    )
    offsets: dict[str, int] = {}
    by_class: dict[str, int] = {}
    end = 0
    for name, (kind, nbytes) in kinds.items():
        offsets[name] = end
        end += aligned(nbytes)
        by_class[CLASS_OF[kind]] = by_class.get(CLASS_OF[kind], 0) + aligned(nbytes)
    return offsets, end, by_class


def _pack(program: Program, kernels: Kernels, fast_memory_bytes: int) -> _Packed:
    blocks = in_place(program, kernels.kernels)
    chosen, used = choose_fast(program, blocks, fast_memory_bytes // ALIGN * ALIGN)
    main = [i for i in range(len(blocks)) if i not in chosen]
    offsets, height = pack([blocks[i] for i in main])
    live = live_bytes(blocks, len(program.calls))
    places = dict(zip(main, offsets, strict=True))
    return _Packed(program, blocks, places, chosen, height, used, live)


def _offsets(packed: _Packed, base: int, height: int) -> dict[str, int]:
    main = {i: base + offset for i, offset in packed.main.items()}
    fast = {i: base + height + offset for i, offset in packed.fast.items()}
    places = main | fast
    return {r.name: places[i] for i, block in enumerate(packed.blocks) for r in block.ranges}


def _label(packed: _Packed) -> str:
    index = min(max(packed.peak_at, 0), len(packed.program.calls) - 1)
    if index < 0:
        return packed.program.name
    call = packed.program.calls[index]
    return call.label or call.symbol
