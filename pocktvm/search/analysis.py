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
WARM_UP_STEPS = (16, 1500)
FINAL_STEPS = (16, 600)  # of its first round
WARM_UP, TRIALS = 0.15, 0.5  # of the time; the final has the rest
TRIAL_RATES = (1.0, 0.3, 0.1)  # times the optimizer's
PROXY_BATCHES = 16
SETTLED = (
    "steps", "warm_up_steps", "final_steps", "step_seconds", "kernel_bytes", "full_work",
)  # fmt: skip


def analyse(study: Study, progress: Progress | None = None) -> Table:
    """The table of the study, with a row for every candidate; goes on where it was left.

    Raises PockError when the file there analyses something else.
    """
    facts, candidates, settings = study.facts(), study.candidates, study.settings
    keys = candidates.keys(settings.shares)
    if study.path.is_file():
        table = Table.open(study.path, facts, SETTLED)
        if table.rows and not table.missing(keys):
            return table
    with opened(study, progress) as (bench, measured):
        measured |= _pace(bench, candidates, settings, len(keys))
        table = Table.open(study.path, {**facts, **measured}, SETTLED)
        if settings.method == "finetune":
            _finetune(bench, candidates, table, keys, progress)
        else:
            _proxy(bench, candidates, table, keys, settings.method, progress)
    return table


def _pace(
    bench: Bench, candidates: Candidates, settings: Settings, trials: int
) -> dict[str, Any]:
    """Steps of the warm-up, of a trial and of the final's first round, so that all together take
    the minutes given; more than the most is not needed, fewer than the least says nothing."""
    step, judge = bench.seconds(candidates.head)
    seconds = settings.minutes * 60

    def steps(share: float, times: float, bounds: tuple[int, int]) -> int:
        return int(np.clip((share * seconds / times - judge) / step, *bounds))

    return {
        "steps": steps(TRIALS, trials + len(TRIAL_RATES) + 1, STEPS),
        "warm_up_steps": steps(WARM_UP, 2, WARM_UP_STEPS),  # for the trials, and for the final
        "final_steps": steps(1 - WARM_UP - TRIALS, rounds_worth(), FINAL_STEPS),
        "step_seconds": step,
    }


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
