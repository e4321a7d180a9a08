"""What lies in the fast memory, where a device has one beside its main memory.

    main   [0, arena - fast)       state, inputs, results, and every other buffer
    fast   [arena - fast, arena)   the buffers with the most traffic for the room they take

On-chip memory (a DSP's tightly coupled memory, a microcontroller's SRAM) is small. Bytes moved per
byte and call of residence decide who gets it, the densest first, each at the lowest gap that holds
it; what does not fit stays in main memory. State stays there as well: it outlives a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pocktvm.ir.kernels import Program
from pocktvm.memory.lifetimes import Block
from pocktvm.memory.pack import lowest_gap


def choose_fast(
    program: Program, blocks: Sequence[Block], limit_bytes: int
) -> tuple[dict[int, int], int]:
    """(index of a block -> offset in the fast memory, bytes used there), at most `limit_bytes`."""
    touches = _touches(program, blocks)
    fixed = {program.root(n) for n in (*program.inputs, *program.outputs.values())}
    able = [
        i
        for i, block in enumerate(blocks)
        if block.nbytes <= limit_bytes and not fixed & {r.name for r in block.ranges}
    ]
    density = {i: touches[i] / (blocks[i].end - blocks[i].start + 1) for i in able}
    placed: dict[int, int] = {}
    for i in sorted(able, key=lambda i: (-density[i], blocks[i].nbytes, blocks[i].start)):
        near = [j for j in placed if _meet(blocks[i], blocks[j])]
        starts = np.array([placed[j] for j in near], np.int64)
        sizes = np.array([blocks[j].nbytes for j in near], np.int64)
        offset = lowest_gap(starts, sizes, blocks[i].nbytes)
        if offset + blocks[i].nbytes <= limit_bytes:
            placed[i] = offset
    return placed, max((o + blocks[i].nbytes for i, o in placed.items()), default=0)


def _touches(program: Program, blocks: Sequence[Block]) -> list[int]:
    """How many arguments of calls lie in each block."""
    owner = {r.name: i for i, block in enumerate(blocks) for r in block.ranges}
    counts = [0] * len(blocks)
    for call in program.calls:
        for name in call.args:
            index = owner.get(program.root(name))
            if index is not None:
                counts[index] += 1
    return counts


def _meet(a: Block, b: Block) -> bool:
    return a.start <= b.end and b.start <= a.end
