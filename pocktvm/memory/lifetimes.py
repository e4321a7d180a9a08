"""When each piece of memory holds something that is still needed.

Time is the index of a call; -1 is the moment before the first one, when the caller's inputs are
written. A buffer is live from the call that first writes it to the last call that reads it, both
included, under any of its names: a view keeps its root alive.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pocktvm.ir.kernels import Call, Kernel, Program, aligned

PERSISTENT = frozenset({"trained", "optimizer", "selection", "scalar"})
CLASS_OF = {
    "frozen": "frozen",
    "trained": "trained",
    "optimizer": "optimizer",
    "selection": "workspace",
    "scalar": "workspace",
    "input": "activations",
    "activation": "activations",
    "gradient": "gradients",
    "workspace": "workspace",
}


@dataclass(frozen=True)
class Range:
    """A root buffer and the calls [start, end] over which its memory is taken."""

    name: str
    nbytes: int  # rounded up to ALIGN
    kind: str
    start: int
    end: int

    @property
    def memory_class(self) -> str:
        """The line of the printed plan that counts it."""
        return CLASS_OF[self.kind]


@dataclass(frozen=True)
class Block:
    """Ranges that follow each other in the same bytes: each one is computed in place of the one
    before, at the call where that dies."""

    ranges: tuple[Range, ...]

    @property
    def nbytes(self) -> int:
        """Bytes the block takes, from its first call to its last."""
        return max(r.nbytes for r in self.ranges)

    @property
    def start(self) -> int:
        """The call that writes its first range."""
        return self.ranges[0].start

    @property
    def end(self) -> int:
        """The last call that needs its last range."""
        return self.ranges[-1].end

    def at(self, call: int) -> Range:
        """What the block holds after `call`."""
        return [r for r in self.ranges if r.start <= call][-1]


def live_ranges(program: Program) -> dict[str, Range]:
    """Root name -> range, for everything that lives in the arena for a part of the program only."""
    starts: dict[str, int] = {}
    ends: dict[str, int] = {}

    def touch(name: str, when: int) -> None:
        root = program.root(name)
        starts.setdefault(root, when)
        ends[root] = max(when, ends.get(root, when))

    for name in program.inputs:
        touch(name, -1)
    for index, call in enumerate(program.calls):
        for name in call.args:
            touch(name, index)
    for name in program.outputs.values():
        touch(name, len(program.calls))
    sizes: dict[str, int] = {}
    for name, buffer in program.buffers.items():
        root = program.root(name)
        sizes[root] = max(sizes.get(root, 0), buffer.nbytes)
    ranges = {}
    for root, start in starts.items():
        kind = program.buffers[root].kind
        if kind != "frozen" and kind not in PERSISTENT:
            ranges[root] = Range(root, aligned(sizes[root]), kind, start, ends[root])
    return ranges


def in_place(program: Program, kernels: Mapping[str, Kernel]) -> list[Block]:
    """Group live ranges into blocks: an output takes the place of an input that dies at its call.

    Only where the kernel allows the pair, both take the same number of bytes, and every other
    argument in that input's memory is a pair of the same output.
    """
    ranges = live_ranges(program)
    before: dict[str, str] = {}  # output root -> the input root whose place it takes
    taken: set[str] = set()
    for index, call in enumerate(program.calls):
        allowed = pairs(call, kernels)
        for out_arg, in_arg in allowed:
            old = ranges.get(program.root(call.args[in_arg]))
            new = ranges.get(program.root(call.args[out_arg]))
            if old is None or new is None or old is new:
                continue
            dies_here = old.end == index and new.start == index and old.start < index
            free = old.name not in taken and new.name not in before
            uses = [i for i, name in enumerate(call.args) if program.root(name) == old.name]
            paired = all((out_arg, i) in allowed for i in uses)
            if dies_here and free and paired and old.nbytes == new.nbytes:
                before[new.name] = old.name
                taken.add(old.name)
    return _chains(ranges, before)


def pairs(call: Call, kernels: Mapping[str, Kernel]) -> tuple[tuple[int, int], ...]:
    """(output, input) arguments that may be the same memory."""
    kernel = kernels.get(call.symbol)
    return tuple(dict.fromkeys((*call.inplace, *(kernel.inplace if kernel else ()))))


def _chains(ranges: Mapping[str, Range], before: Mapping[str, str]) -> list[Block]:
    after = {old: new for new, old in before.items()}
    blocks = []
    for name in ranges:
        if name in before:
            continue
        chain = [ranges[name]]
        while chain[-1].name in after:
            chain.append(ranges[after[chain[-1].name]])
        blocks.append(Block(tuple(chain)))
    return blocks
