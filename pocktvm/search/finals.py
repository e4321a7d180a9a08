"""The last step of a search: train the likely choices as a whole, for longer, and take the best.

Contributions are of single tensors, measured in a few steps; that they add up is an assumption. A
final drops it: every finalist trains from the same start, at the rate of the trials and at a third
of it, both falling to zero, on the same samples; what counts is the loss on the held-out ones. The
classifier alone is among them, as what gains are told against.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from pocktvm.search.bench import Bench
from pocktvm.search.select import Choice
from pocktvm.search.table import Row, Table

LONGER = 4  # times the steps of a trial
RATES = (1.0, 1 / 3)  # of the rate of the trials
ENTRANTS = 8  # about as many, for the time they take
KIND = "joint"

Progress = Callable[[str, str], None]


def trials_worth() -> int:
    """How many trials' time a final takes, about."""
    return LONGER * len(RATES) * ENTRANTS


def key_of(choice: Choice) -> tuple[str, str, float]:
    """The row of a finalist: what learns, in short; the digest tells it from all others."""
    text = json.dumps([choice.depth, sorted(choice.weights.items())])
    name = f"{choice.depth} blocks, {len(choice.weights)} weights, "
    return KIND, name + hashlib.sha256(text.encode()).hexdigest()[:12], 1.0


def judged(table: Table, choices: Sequence[Choice]) -> bool:
    """True when the table has a result of every finalist."""
    return not table.missing([key_of(choice) for choice in choices])


def hold_final(
    bench: Bench,
    head: Mapping[str, float],
    table: Table,
    choices: Sequence[Choice],
    progress: Progress | None = None,
) -> None:
    """Add a row for each finalist that has none. `bench` is warmed up here."""
    left = [c for c in dict((key_of(c), c) for c in choices).values() if not judged(table, [c])]
    if not left:
        return
    steps = int(table.facts["steps"])
    bench.warm_up(head, steps)
    alone = _lowest(bench, head, LONGER * steps)
    for number, choice in enumerate(left):
        if progress:
            progress("train the finalists", f"{number + 1}/{len(left)}")
        began = time.monotonic()
        loss = _lowest(bench, choice.updated, LONGER * steps)
        gain = alone - loss if np.isfinite(loss) else -1e9  # it diverged
        table.add(Row(*key_of(choice), float(gain), round(time.monotonic() - began, 3)))


def winner(table: Table, choices: Sequence[Choice]) -> int:
    """The place of the finalist with the largest gain; of equals the first."""
    return int(np.argmax([table.rows[key_of(choice)].gain for choice in choices]))


def _lowest(bench: Bench, updated: Mapping[str, float], steps: int) -> float:
    """The lower of the held-out losses at the two rates; infinite where both diverge."""
    losses = []
    for rate in RATES:
        bench.fit(updated, steps, rate=rate, decay=True)
        loss = bench.held_out_loss()
        losses.append(loss if np.isfinite(loss) else np.inf)
    return float(min(losses))
