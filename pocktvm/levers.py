"""What a build does so that its plan fits --budget, and what that costs.

The first lever is to compute again what is too large to keep (passes/rematerialize.py), the second
to run the batch in parts (autodiff/micro_batch.py), both together if need be; of what fits, the
quickest by estimate is taken. How low the step must get is known only when its kernels are (code,
packed weights, workspaces), so graphs are shrunk by the estimate, compiled, and shrunk further by
what the plan still exceeds the budget.
"""

from __future__ import annotations

import functools
import json
import math
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pocktvm.files import write_whole
from pocktvm.ir.graph import Graph
from pocktvm.ir.kernels import Kernels, aligned
from pocktvm.ir.memory import MemoryPlan
from pocktvm.ir.target import Target
from pocktvm.manifest import MANIFEST, read_manifest
from pocktvm.passes.compare import checking, compare
from pocktvm.passes.costs import flops, seconds
from pocktvm.passes.liveness import Lifetimes
from pocktvm.passes.order import order
from pocktvm.passes.rematerialize import is_again, rematerialize
from pocktvm.units import format_bytes

Planned = tuple[Kernels, MemoryPlan]
ATTEMPTS = 6  # compile, look at the plan, shrink by what is missing
ROUNDS, SECONDS = 6, 16.0  # of measuring: turns of either artifact, and how long all take, about
TOLERABLE = 1.15  # of a step's time: below that recomputation alone is taken without a look around
CALLS = 5000  # of a step in parts: more make the build take minutes
MARGIN = 1.002  # packing loses a little of what a lower peak gains


@dataclass(frozen=True)
class Trade:
    """Bytes against time. `flops` and `seconds` are what a step has more of, `step_*` what it has
    without; `measured`: the seconds are this machine's, of one thread's processor time, otherwise a
    roofline's for the whole device. Measured, `seconds` may be negative: what a smaller arena saves
    in cache misses can outweigh the work."""

    parts: int
    kernels: int
    saved_bytes: int
    flops: int
    step_flops: int
    seconds: float
    step_seconds: float
    measured: bool = False

    def facts(self) -> dict[str, Any]:
        """Its fields and its text, for the manifest."""
        return {**vars(self), "text": str(self)}

    def __str__(self) -> str:
        how = "measured on one thread" if self.measured else "estimated"
        done = [f"the batch runs in {self.parts} parts"] if self.parts > 1 else []
        done += [f"{self.kernels} kernels run twice"] if self.kernels else []
        return (
            f"to fit the budget {' and '.join(done)}: "
            f"-{format_bytes(self.saved_bytes)}, +{self.flops / 1e9:.2f} GFLOP a step "
            f"(+{self.flops / max(self.step_flops, 1):.1%}), "
            f"{1e3 * self.step_seconds:.2f} -> {1e3 * (self.step_seconds + self.seconds):.2f} ms "
            f"({self.seconds / max(self.step_seconds, 1e-9):+.1%}, {how})"
        )


def shrunk(graphs: Sequence[Graph], limit: int, target: Target) -> tuple[Graph, ...]:
    """The programs with their transient bytes lowered to what `limit` leaves beside weights, where
    that can be reached; as low as possible elsewhere."""
    fixed = _persistent(graphs) + sum(
        int(a.nbytes) for a in {n: a for g in graphs for n, a in g.consts.items()}.values()
    )
    room = max(0, limit - fixed)
    return tuple(_shrunk(graph, room, target) for graph in graphs)


def _persistent(graphs: Sequence[Graph]) -> int:
    params = {n: p for g in graphs for n, p in g.params.items()}
    return sum(aligned(int(p.value.nbytes)) for p in params.values())


def peak(graph: Graph) -> int:
    """Transient bytes at the step's peak, as passes count them."""
    return int(Lifetimes(graph, graph.nodes, graph.values).live().max(initial=0))


def _shrunk(graph: Graph, room: int, target: Target) -> Graph:
    if peak(graph) <= room:
        return graph
    fewer = rematerialize(graph, room, lambda node, values: seconds(node, values, target))
    fewer = min((fewer, order(fewer)), key=peak)
    if checking():
        compare(graph, fewer, "rematerialize")
    return fewer


def fitted(
    graphs: tuple[Graph, ...],
    limit: int | None,
    target: Target,
    compiled: Callable[[tuple[Graph, ...]], Planned],
    check: Callable[[tuple[Graph, ...], MemoryPlan | None], None],
    in_parts: Callable[[int], Graph | None],
    batch: int,
) -> tuple[tuple[Graph, ...], Kernels, MemoryPlan, Trade | None]:
    """Graphs, kernels and plan within `limit`, with the trade where levers were pulled.

    `check` raises PockError for a plan, or for the graphs' lower bound, above the limit; `in_parts`
    gives the step that takes the batch in parts, or None.
    """
    if limit is None:
        return (graphs, *compiled(graphs), None)
    in_parts = functools.cache(in_parts)
    aim, last = limit, None
    for attempt in range(ATTEMPTS):
        parts, now = _chosen(graphs, aim, target, in_parts, batch)
        check(now, None)
        if last is not None and all(a.nodes == b.nodes for a, b in zip(now, last, strict=True)):
            break
        kernels, plan = compiled(now)
        if plan.total_bytes <= limit:
            return now, kernels, plan, trade(graphs, now, target, parts)
        last, over = now, plan.total_bytes - limit
        aim = min(aim, _total(now)) - int(over * (MARGIN if attempt == 0 else 1.2)) - 4096
    check(now, plan)
    return now, kernels, plan, trade(graphs, now, target, parts)


def _chosen(
    graphs: tuple[Graph, ...], limit: int, target: Target,
    in_parts: Callable[[int], Graph | None], batch: int,
) -> tuple[int, tuple[Graph, ...]]:  # fmt: skip
    """(parts, programs) of the quickest step that fits by estimate, or of the smallest. Parts are
    looked at only where the whole batch does not fit or costs too much, and only as many as leave
    what must be kept, shrunk as far as the whole batch was, within the limit."""

    def score_of(programs: tuple[Graph, ...]) -> tuple[int, float]:
        return max(0, _total(programs) - limit), _seconds(programs[0], target)

    plain, now = _seconds(graphs[0], target), shrunk(graphs, limit, target)
    best, found = score_of(now), (1, now)
    if best[0] == 0 and best[1] <= TOLERABLE * plain:
        return found
    for parts in _counts(graphs[0], now, limit, batch):
        if (step := in_parts(parts)) is None:
            break
        now = shrunk((step, *graphs[1:]), limit, target)
        if (score := score_of(now)) < best:
            best, found = score, (parts, now)
        if score[0] == 0:
            break  # more parts keep less and cost more
    return found


def _counts(step: Graph, whole: tuple[Graph, ...], limit: int, batch: int) -> list[int]:
    """Numbers of equal parts worth a look, where `whole` is what not parting comes to: those with
    which the limit is in reach, or the largest where it is with none."""
    least = max(peak(g) for g in whole)
    room, sums = least - (_total(whole) - limit), _sums(step)
    counts = [p for p in range(2, batch + 1) if batch % p == 0 and p * len(step.nodes) <= CALLS]
    within = [p for p in counts if sums + least / p <= room]
    return within or [p for p in counts[-1:] if sums + least / p < least]


def _sums(step: Graph) -> int:
    """Bytes of a gradient for everything that learns: what a step in parts keeps from the first
    part to the last."""
    learning = (p for p in step.params.values() if p.kind == "trained")
    return int(sum((p.part or 1.0) * p.value.nbytes for p in learning))


def _seconds(graph: Graph, target: Target) -> float:
    return sum(seconds(n, graph.values, target) for n in graph.nodes if n.op != "reshape")


def _total(graphs: Sequence[Graph]) -> int:
    """What `shrunk` compares with its limit."""
    consts = {n: a for g in graphs for n, a in g.consts.items()}
    fixed = _persistent(graphs) + sum(int(a.nbytes) for a in consts.values())
    return fixed + max(peak(g) for g in graphs)


def trade(
    before: Sequence[Graph], after: Sequence[Graph], target: Target, parts: int = 1
) -> Trade | None:
    """What `after` gave and took; None where nothing was done."""
    again = [n for g in after for n in g.nodes if is_again(n) and n.op != "reshape"]
    if not again and parts == 1:
        return None
    works = [sum(flops(n, g.values) for n in g.nodes) for g in (before[0], after[0])]
    return Trade(
        parts=parts,
        kernels=len(again),
        saved_bytes=max(map(peak, before)) - max(map(peak, after)),
        flops=works[1] - works[0],
        step_flops=works[0],
        seconds=_seconds(after[0], target) - _seconds(before[0], target),
        step_seconds=_seconds(before[0], target),
    )


def measured(trade: Trade, folder: Path, plain: Path) -> Trade:
    """The trade with this machine's seconds, put into the artifact's manifest: steps of the
    artifact and of the one without levers, by turns. What cannot be run here stays an estimate.

    A profile of the calls that run twice would say too much: a smaller arena saves cache misses.
    One thread's processor time is what a busy machine gives too, where the clock on the wall says
    twice as much.
    """
    times: dict[Path, list[float]] = {folder: [], plain: []}
    steps = 3
    for turn in range(ROUNDS + 1):  # the first round only tells how many steps a round has
        found = [_step_ms(path, steps) for path in times]
        if not all(found):
            return trade
        for path, ms in zip(times, found, strict=True):
            times[path].append(ms if turn else math.inf)
        if not turn:
            steps = int(min(40, max(3, 1e3 * SECONDS / ROUNDS / sum(found))))
    now, before = (min(times[path]) * 1e-3 for path in (folder, plain))
    stated = replace(trade, seconds=now - before, step_seconds=before, measured=True)
    _tell(folder, stated.facts())
    return stated


def _step_ms(folder: Path, steps: int) -> float:
    """One thread's median over some steps of an artifact; 0 where it cannot run."""
    command = [str(folder / "pocktvm-run"), str(folder), "--steps", str(steps), "--json"]
    done = subprocess.run([*command, "--threads", "1"], capture_output=True, text=True, check=False)
    return 0.0 if done.returncode else float(json.loads(done.stdout)["step_cpu_ms_median"])


def _tell(folder: Path, facts: Mapping[str, Any]) -> None:
    manifest = {**read_manifest(folder), "trade": dict(facts)}
    write_whole(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n", "the manifest")
