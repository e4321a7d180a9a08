"""Contribution analysis: what does each candidate add to training the classifier alone?

One artifact is compiled in which everything may learn, at rates that are an input of its step;
every trial is that artifact with other rates. `finetune` trains each candidate briefly and measures
the held-out loss; `fisher` and `grad-norm` read the gradients of some batches instead.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from pocktvm.build import Progress
from pocktvm.ir.part import Part
from pocktvm.search.bench import Bench
from pocktvm.search.candidates import Candidates, Key
from pocktvm.search.finals import rounds_worth
from pocktvm.search.study import Settings, Study
from pocktvm.search.table import Row, Table
from pocktvm.search.trials import opened

STEPS = (8, 60)  # of a trial, at least and at most
ENOUGH = 24  # steps of a trial: with fewer, parts of weights are not tried
WARM_UP_STEPS = (16, 1500)
FINAL_STEPS = (16, 600)  # of its first round
WARM_UP, TRIALS = 0.1, 0.3  # of the time; the final has the rest
TRIAL_RATES = (1.0, 0.3, 0.1)  # times the optimizer's
PROXY_BATCHES = 16
SETTLED = (
    "steps", "warm_up_steps", "final_steps", "tried_shares", "step_seconds", "kernel_bytes",
    "full_work",
)  # fmt: skip


def analyse(study: Study, progress: Progress | None = None) -> Table:
    """The table of the study, with a row for every candidate; goes on where it was left.

    Raises PockError when the file there analyses something else.
    """
    facts, candidates, settings = study.facts(), study.candidates, study.settings
    if study.path.is_file():
        table = Table.open(study.path, facts, SETTLED)
        if table.rows and not table.missing(_keys(table, candidates)):
            return table
    with opened(study, progress) as (bench, measured):
        measured |= _pace(bench, candidates, settings)
        table = Table.open(study.path, {**facts, **measured}, SETTLED)
        keys = _keys(table, candidates)
        if settings.method == "finetune":
            _finetune(bench, candidates, table, keys, progress)
        else:
            _proxy(bench, candidates, table, keys, settings.method, progress)
    return table


def _keys(table: Table, candidates: Candidates) -> list[Key]:
    """The trials of a table."""
    return candidates.keys(tuple(table.facts.get("tried_shares", ())))


def _pace(bench: Bench, candidates: Candidates, settings: Settings) -> dict[str, Any]:
    """Steps of the warm-up, of a trial and of the final's first round, so that all together take
    the minutes given; more than the most is not needed, fewer than the least says nothing. Where
    trials would be short, fewer shares of each weight are tried: what the others gain is read off
    the curve (curve.py)."""
    step, judge = bench.seconds(candidates.head)
    seconds = settings.minutes * 60

    def steps(share: float, times: float) -> float:
        return (share * seconds / times - judge) / step

    def of_trial(shares: tuple[float, ...]) -> float:
        return steps(TRIALS, len(candidates.keys(shares)) + len(TRIAL_RATES) + 1)

    shares = settings.shares
    while len(shares) > 1 and settings.method == "finetune" and of_trial(shares) < ENOUGH:
        shares = shares[:-1]
    return {
        "steps": _bounded(of_trial(shares), STEPS),
        "warm_up_steps": _bounded(steps(WARM_UP, 2), WARM_UP_STEPS),  # for trials and for the final
        "final_steps": _bounded(steps(1 - WARM_UP - TRIALS, rounds_worth()), FINAL_STEPS),
        "tried_shares": list(shares),
        "step_seconds": step,
    }


def _bounded(steps: float, bounds: tuple[int, int]) -> int:
    return int(np.clip(steps, *bounds))


def _finetune(
    bench: Bench,
    candidates: Candidates,
    table: Table,
    keys: list[Key],
    progress: Progress | None,
) -> None:
    """Gain: how much lower the held-out loss ends than with the classifier alone."""
    steps = int(table.facts["steps"])
    bench.warm_up(candidates.head, int(table.facts["warm_up_steps"]))
    rate = _rate(bench, steps)
    bench.fit(candidates.head, steps, rate=rate, decay=True)
    alone = bench.held_out_loss()
    left = table.missing(keys)
    begin = time.monotonic()
    for number, key in enumerate(left):
        _tell(progress, len(keys) - len(left) + number, len(keys), number, len(left), begin)
        started = time.monotonic()
        bench.fit(candidates.updated(key), steps, rate=rate, decay=True)
        loss = bench.held_out_loss()
        gain = alone - loss if np.isfinite(loss) else -1e9  # it diverged
        table.add(Row(*key, float(gain), round(time.monotonic() - started, 3)))


def _rate(bench: Bench, steps: int) -> float:
    """The rate of trials, of the optimizer's: the one at which everything together learns best.

    At too high a rate a few steps of a large weight do harm, and it would come out as worthless.
    """
    everything = dict.fromkeys(bench.rates.slots, 1.0)
    losses = []
    for rate in TRIAL_RATES:
        bench.fit(everything, steps, rate=rate, decay=True)
        loss = bench.held_out_loss()
        losses.append(loss if np.isfinite(loss) else np.inf)
    return TRIAL_RATES[int(np.argmin(losses))]


def _tell(
    progress: Progress | None, at: int, total: int, done: int, left: int, begin: float
) -> None:
    if progress is None:
        return
    text = f"{at + 1}/{total}"
    if done:
        seconds = (time.monotonic() - begin) / done * (left - done)
        text += f", {seconds / 60:.0f} min left" if seconds > 90 else f", {seconds:.0f} s left"
    progress("try candidates", text)


def _proxy(
    bench: Bench,
    candidates: Candidates,
    table: Table,
    keys: list[Key],
    method: str,
    progress: Progress | None,
) -> None:
    """grad-norm: mean squared norm of the gradient, what a small step of SGD gains to first order;
    fisher: mean of (weight * gradient)² / 2, what removing the weights would cost."""
    bench.warm_up(candidates.head, int(table.facts["warm_up_steps"]))
    names = dict.fromkeys(bench.rates.slots, 1.0)
    scores: dict[str, np.ndarray] = {}
    for number, rows in enumerate(bench.batches(PROXY_BATCHES)):
        if progress:
            progress("read gradients", f"{number + 1}/{PROXY_BATCHES}")
        for name, gradient in bench.gradient(rows, names).items():
            value = candidates.model.parameters[name].value if method == "fisher" else 1.0
            score = np.square(gradient * value) / (2 if method == "fisher" else 1)
            scores[name] = scores.get(name, np.zeros(())) + score / PROXY_BATCHES
    for key in table.missing(keys):
        learns = {n: p for n, p in candidates.updated(key).items() if n not in candidates.head}
        table.add(Row(*key, float(sum(_score(scores[n], p) for n, p in learns.items()))))


def _score(scores: np.ndarray, part: float) -> float:
    if isinstance(part, Part):
        scores = np.take(scores, part.indices, part.axis)
    return float(scores.sum())
