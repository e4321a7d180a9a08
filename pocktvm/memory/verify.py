"""Check a plan by walking the programs, byte range by byte range.

This shares no code with the planner and believes none of its lifetimes. It keeps a map from bytes
of the arena to the value they hold, runs each program on it, and raises at the first call that
would read bytes holding something else: a clobbered activation, a parameter after its update,
memory nobody wrote. Sharing within one call is legal only through a pair the kernel declares.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right

from pocktvm.errors import InternalError
from pocktvm.ir.kernels import ALIGN, Call, Kernels, Program
from pocktvm.ir.memory import MemoryPlan

_KEPT = ("trained", "optimizer", "selection", "scalar")


def verify(kernels: Kernels, plan: MemoryPlan) -> None:
    """Raise InternalError where `plan` would make a program compute something else."""
    _same_in_all_programs(kernels, plan)
    for program in kernels.programs.values():
        _Walk(kernels, program, plan).run()


def _same_in_all_programs(kernels: Kernels, plan: MemoryPlan) -> None:
    places: dict[str, int] = {}
    for program in kernels.programs.values():
        offsets = plan.offsets.get(program.name)
        if offsets is None:
            raise InternalError(f"the plan has no offsets for program '{program.name}'")
        for name in kernels.params:
            offset = offsets.get(name)
            if offset is None:
                raise InternalError(f"{program.name}: parameter '{name}' has no place in the plan")
            if places.setdefault(name, offset) != offset:
                raise InternalError(f"parameter '{name}' moves between programs")


class _Memory:
    """Disjoint segments of the arena, sorted, each with the value it holds."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.ends: list[int] = []
        self.holds: list[str] = []

    def overlapping(self, start: int, end: int) -> range:
        """Indices of the segments that meet [start, end)."""
        return range(bisect_right(self.ends, start), bisect_left(self.starts, end))

    def write(self, start: int, end: int, value: str) -> None:
        """Let [start, end) hold `value`; what was there is cut off."""
        hit = self.overlapping(start, end)
        pieces: list[tuple[int, int, str]] = []
        for i in hit:
            if self.starts[i] < start:
                pieces.append((self.starts[i], start, self.holds[i]))
        pieces.append((start, end, value))
        for i in hit:
            if self.ends[i] > end:
                pieces.append((end, self.ends[i], self.holds[i]))
        where = slice(hit.start, hit.stop)
        self.starts[where] = [p[0] for p in pieces]
        self.ends[where] = [p[1] for p in pieces]
        self.holds[where] = [p[2] for p in pieces]

    def contents(self, start: int, end: int) -> set[str]:
        """Values in [start, end); "" stands for bytes nobody wrote."""
        found = set()
        at = start
        for i in self.overlapping(start, end):
            if self.starts[i] > at:
                found.add("")
            found.add(self.holds[i])
            at = self.ends[i]
        if at < end:
            found.add("")
        return found


class _Walk:
    """One program, run on a map of bytes."""

    def __init__(self, kernels: Kernels, program: Program, plan: MemoryPlan) -> None:
        self.kernels = kernels
        self.program = program
        self.plan = plan
        self.offsets = plan.offsets[program.name]
        self.memory = _Memory()
        self.written = {name for call in program.calls for name in call.writes}

    def run(self) -> None:
        """Place what is there before the first call, run the calls, look at what is left."""
        self._before()
        for index, call in enumerate(self.program.calls):
            self._call(call, f"{self.program.name} call {index} {call.label or call.symbol}")
        self._after()

    def _before(self) -> None:
        names = [*self.kernels.params, *self.program.scalars, *self.program.inputs]
        kept = [n for n, b in self.program.buffers.items() if b.kind in _KEPT and not b.alias_of]
        for name in dict.fromkeys((*names, *kept)):
            start, end = self._span(name, "before the first call")
            if others := self.memory.contents(start, end) - {""}:
                raise InternalError(
                    f"{self.program.name}: '{name}' lies over {sorted(others)} from the start"
                )
            self.memory.write(start, end, self._value(name))

    def _call(self, call: Call, where: str) -> None:
        for name in call.reads:
            self._read(name, where)
        self._sharing(call, where)
        for name in call.writes:
            if self._is_frozen(name):
                raise InternalError(f"{where}: writes the frozen '{name}'")
            self.memory.write(*self._span(name, where), name)

    def _read(self, name: str, where: str) -> None:
        if self._is_frozen(name):
            if self._root(name) not in self.kernels.consts:
                raise InternalError(f"{where}: reads the frozen '{name}', which has no data")
            return
        found = self.memory.contents(*self._span(name, where))
        if found != {self._value(name)}:
            held = ", ".join(repr(f) if f else "nothing" for f in sorted(found))
            raise InternalError(f"{where}: reads '{name}' where the arena holds {held}")

    def _sharing(self, call: Call, where: str) -> None:
        """What a call writes may meet what it reads only at the same offset, through a pair."""
        kernel = self.kernels.kernels.get(call.symbol)
        allowed = {*call.inplace, *(kernel.inplace if kernel is not None else ())}
        spans = [None if self._is_frozen(name) else self._span(name, where) for name in call.args]
        for out in range(call.n_inputs, len(call.args)):
            for other in range(out):
                a, b = spans[out], spans[other]
                if a is None or b is None or a[1] <= b[0] or b[1] <= a[0]:
                    continue
                if other < call.n_inputs and (out, other) in allowed and a[0] == b[0]:
                    continue
                raise InternalError(
                    f"{where}: writes '{call.args[out]}' over its argument '{call.args[other]}', "
                    f"and ({out}, {other}) is no in-place pair of {call.symbol}"
                )

    def _after(self) -> None:
        for label, name in self.program.outputs.items():
            self._read(name, f"{self.program.name} output '{label}'")
        for name in self.kernels.params:
            found = self.memory.contents(*self._span(name, "at the end"))
            if len(found) != 1 or self._root(next(iter(found))) != name:
                raise InternalError(
                    f"{self.program.name}: at the end '{name}' holds {sorted(found)}"
                )

    def _span(self, name: str, where: str) -> tuple[int, int]:
        """The bytes of a buffer, checked against the arena."""
        root = self._root(name)
        if root not in self.offsets:
            raise InternalError(f"{where}: '{root}' has no place in the plan")
        start = self.offsets[root]
        buffer = self.program.buffers.get(name)
        nbytes = buffer.nbytes if buffer else int(self.kernels.params[name].value.nbytes)
        end = start + nbytes
        if start % ALIGN or start < 0:
            raise InternalError(f"{where}: '{name}' lies at {start}, not a multiple of {ALIGN}")
        keeps = name in self.kernels.params or self.program.buffers[root].kind in _KEPT
        low, high = (
            (0, self.plan.persistent_bytes)
            if keeps
            else (
                self.plan.persistent_bytes,
                self.plan.arena_bytes,
            )
        )
        split = self.plan.arena_bytes - self.plan.fast_bytes
        outside = root in (*self.program.inputs, *self._results())
        if start < split < end or (end > split and outside):
            raise InternalError(
                f"{where}: '{name}' takes [{start}, {end}), the fast memory begins at {split}"
            )
        if start < low or end > high:
            raise InternalError(
                f"{where}: '{name}' takes [{start}, {end}), allowed is [{low}, {high})"
            )
        return start, end

    def _results(self) -> set[str]:
        return {self._root(name) for name in self.program.outputs.values()}

    def _root(self, name: str) -> str:
        return name if name not in self.program.buffers else self.program.root(name)

    def _value(self, name: str) -> str:
        """The name under which the value was written: a view reads its source's value."""
        while name not in self.written:
            buffer = self.program.buffers.get(name)
            if buffer is None or buffer.alias_of is None:
                return name
            name = buffer.alias_of
        return name

    def _is_frozen(self, name: str) -> bool:
        return self.program.buffers[self._root(name)].kind == "frozen"
