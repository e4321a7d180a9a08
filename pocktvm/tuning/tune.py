"""Tune every kernel of a model: search, compare the winner with the default, keep a record."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocktvm.files import cache_dir
from pocktvm.identity import versions
from pocktvm.ir.graph import Graph
from pocktvm.ir.target import Target
from pocktvm.schedule.compile_kernel import Compiled, KernelCompiler
from pocktvm.schedule.program import ProgramBuilder
from pocktvm.schedule.rule import Rule, Task, defaults
from pocktvm.tuning.candidate import build_candidate
from pocktvm.tuning.records import Record, Records, task_key
from pocktvm.tuning.runners import CandidateError, Runner
from pocktvm.tuning.search import FAILED, Journal, Measured, search, space_size

Progress = Callable[[str, int, int, float, float], None]  # kernel, done, all, seconds, best


@dataclass(frozen=True)
class Tunable:
    """A kernel with knobs, and how many calls of the model use it."""

    task: Task
    rule: Rule
    calls: int

    @property
    def what(self) -> str:
        """A short name for people."""
        node = self.task.node
        shapes = " ".join("x".join(map(str, self.task.shape(n))) for n in node.inputs[:2])
        return f"{'+'.join(n.op for n in node.kernel_nodes()[:4])} {shapes}"


@dataclass(frozen=True)
class Summary:
    """What a tuning run did; seconds are sums over one step's kernels."""

    tuned: int
    kept: int
    improved: int
    left: int
    default_seconds: float
    best_seconds: float


class _Collector(KernelCompiler):
    """A compiler that remembers which tasks it compiled."""

    def compile(self, task: Task) -> Compiled:
        self.seen = getattr(self, "seen", {})
        self.counts = getattr(self, "counts", {})
        compiled = super().compile(task)
        self.seen[task.signature] = task
        self.counts[task.signature] = self.counts.get(task.signature, 0) + 1
        return compiled


def tunable_kernels(graphs: Sequence[Graph], target: Target) -> list[Tunable]:
    """The kernels with more than one point, heaviest first (by FLOPs x calls)."""
    from pocktvm.schedule.compile_kernel import choose_rule

    collector = _Collector()
    for graph in graphs:
        ProgramBuilder(graph, target, collector, {}).build()
    found = []
    for signature, task in collector.seen.items():
        rule = choose_rule(task)
        if space_size(rule.knobs(task)) > 1:
            flops = collector.done[signature].kernel.flops * collector.counts[signature]
            found.append((flops, Tunable(task, rule, collector.counts[signature])))
    return [t for _, t in sorted(found, key=lambda item: -item[0])]


def tune(
    kernels: Sequence[Tunable],
    target: Target,
    runner: Runner,
    *,
    trials: int = 16,
    seconds: float | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Tune kernels that have no record yet; at most `seconds` in all.

    What is left of the time is shared among the kernels that are left, so that each gets a record.
    Each kernel's record is written as soon as its search ends; a killed run loses at most the
    candidate in flight, since the journal of an unfinished search is read again.
    """
    records, start = Records(target), time.monotonic()
    deadline = start + seconds if seconds is not None else float("inf")
    tuned = improved = kept = 0
    before = after = 0.0
    for index, kernel in enumerate(kernels):
        record = records.find(kernel.task, kernel.rule)
        if record is None and (now := time.monotonic()) < deadline:
            share = now + (deadline - now) / (len(kernels) - index)
            bar = _bar(progress, index, len(kernels), kernel.what)
            record = _tune_one(kernel, target, runner, trials, share, bar)
            if record is not None:
                records.keep(kernel.task, kernel.rule, record)
                tuned += 1
        elif record is not None:
            kept += 1
        if record is not None:
            improved += record.seconds < record.default_seconds
            before += record.default_seconds * kernel.calls
            after += record.seconds * kernel.calls
    return Summary(tuned, kept, improved, len(kernels) - tuned - kept, before, after)


def _bar(progress: Progress | None, index: int, count: int, what: str) -> Any:
    def report(trial: int, seconds: float, best: float) -> None:
        if progress:
            progress(what, index, count, seconds, best)

    return report


def _tune_one(
    kernel: Tunable, target: Target, runner: Runner, trials: int, deadline: float, report: Any
) -> Record | None:
    task, rule = kernel.task, kernel.rule
    journal = Journal(cache_dir() / "tuning" / target.name / f"{task_key(task)}.jsonl")
    base = defaults(rule.knobs(task))
    with tempfile.TemporaryDirectory(prefix="pocktvm-tune-") as folder:
        scratch = Path(folder)
        runner.reset()
        try:
            default = build_candidate(task, rule, base, _sub(scratch, "default"))
            runner.time(default.folder)  # the outputs every candidate has to reproduce
        except CandidateError:
            return None
        measured = Measured(task, rule, runner, journal, report, deadline, scratch)
        measured.measure(base)
        search(measured, trials)
        good = {k: s for k, s in journal.seconds.items() if s < FAILED}
        if not good:
            return None
        best = json.loads(min(good, key=lambda k: good[k]))
        if best == base:  # nothing to compare: it is the default
            return _record(kernel, base, good[_text(base)], good[_text(base)], journal)
        return _compare(kernel, runner, scratch, default.folder, base, best, journal)


def _compare(
    kernel: Tunable, runner: Runner, scratch: Path, default: Path, base: Any, best: Any,
    journal: Journal,
) -> Record | None:  # fmt: skip
    """Interleave the winner with the default; the default stays unless it is beaten by 2 %."""
    try:
        winner = build_candidate(kernel.task, kernel.rule, best, _sub(scratch, "winner"))
        slow, fast = runner.compare(default, winner.folder)
    except CandidateError:
        return None
    if fast < 0.98 * slow:
        return _record(kernel, best, fast, slow, journal)
    return _record(kernel, base, slow, slow, journal)


def _record(
    kernel: Tunable, knobs: Any, seconds: float, default_seconds: float, journal: Journal
) -> Record:
    names = ("pocktvm", "apache-tvm")
    made_by = {n: v for n, v in versions().items() if n in names}
    return Record(kernel.what, knobs, seconds, default_seconds, len(journal.seconds), made_by)


def _text(knobs: Any) -> str:
    """Knobs as the journal writes them."""
    return json.dumps(dict(knobs), sort_keys=True)


def _sub(folder: Path, name: str) -> Path:
    path = folder / name
    path.mkdir()
    return path
