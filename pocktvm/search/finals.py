"""The last step of a search: train the likely choices as a whole, for longer, and take the best.

Contributions are of single tensors, measured in a few steps; that they add up is an assumption. A
final drops it: every finalist trains from the same start, at two rates that fall to zero, on the
same samples; what counts is the lower loss on the held-out ones. What learns much needs its time,
and in few steps a low rate: at a high one, forty steps of a few biases look better than those of
whole blocks. So the best of a first round train again, longer and faster, and one of them wins.
The classifier alone is among the first, as what gains are told against.
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

RATES = (0.3, 0.1)  # of the optimizer's
LONGER_RATES = (1.0, 0.3, 0.1)
LONGER, LAST = 3, 3  # times the steps of the first round; how many train so long
ENTRANTS = 12  # about as many, with the classifier alone
KIND, AGAIN = "joint", "joint longer"

Progress = Callable[[str, str], None]


def rounds_worth() -> int:
    """How many times the steps of the first round a final takes, about."""
    return len(RATES) * ENTRANTS + len(LONGER_RATES) * LONGER * (LAST + 1)


def key_of(choice: Choice, kind: str = KIND) -> tuple[str, str, float]:
    """The row of a finalist: what learns, in short; the digest tells it from all others."""
    text = json.dumps([choice.depth, sorted(choice.weights.items())])
    name = f"{choice.depth} blocks, {len(choice.weights)} weights, "
    return kind, name + hashlib.sha256(text.encode()).hexdigest()[:12], 1.0


def judged(table: Table, choices: Sequence[Choice]) -> bool:
    """True when the table has every finalist's result of the first round, and the best ones' of
    the second."""
    first = [key_of(choice) for choice in choices]
    if table.missing(first):
        return False
    return not table.missing([key_of(choice, AGAIN) for choice in _best(table, choices)])


def _best(table: Table, choices: Sequence[Choice]) -> list[Choice]:
    """Those that train for longer: the best of the first round; of equals the first."""
    unique = list({key_of(c): c for c in choices}.values())
    return sorted(unique, key=lambda c: -table.rows[key_of(c)].gain)[:LAST]


def hold_final(
    bench: Bench,
    head: Mapping[str, float],
    table: Table,
    choices: Sequence[Choice],
    progress: Progress | None = None,
) -> None:
    """Add the rows that are missing. `bench` is warmed up here."""
    if judged(table, choices):
        return
    bench.warm_up(head, int(table.facts["warm_up_steps"]))
    steps = int(table.facts["final_steps"])
    first = {key_of(c): c for c in choices}
    _round(bench, head, table, first, steps, RATES, progress)
    again = {key_of(c, AGAIN): c for c in _best(table, choices)}
    _round(bench, head, table, again, LONGER * steps, LONGER_RATES, progress)


def winner(table: Table, choices: Sequence[Choice]) -> int:
    """The place of the one that did best in the second round; of equals the first."""
    gains = [table.rows.get(key_of(choice, AGAIN)) for choice in choices]
    return int(np.argmax([-np.inf if row is None else row.gain for row in gains]))


def _round(
    bench: Bench,
    head: Mapping[str, float],
    table: Table,
    entrants: Mapping[tuple[str, str, float], Choice],
    steps: int,
    rates: Sequence[float],
    progress: Progress | None,
) -> None:
    """A row for each entrant that has none: how much lower than the classifier alone it ends."""
    left = table.missing(list(entrants))
    if not left:
        return
    alone = _lowest(bench, head, steps, rates)
    for number, key in enumerate(left):
        if progress:
            progress("train the finalists", f"{number + 1}/{len(left)}, {steps} steps")
        began = time.monotonic()
        loss = _lowest(bench, entrants[key].updated, steps, rates)
        gain = alone - loss if np.isfinite(loss) else -1e9  # it diverged
        table.add(Row(*key, float(gain), round(time.monotonic() - began, 3)))


def _lowest(
    bench: Bench, updated: Mapping[str, float], steps: int, rates: Sequence[float]
) -> float:
    """The lowest of the held-out losses at these rates; infinite where all diverge."""
    losses = []
    for rate in rates:
        bench.fit(updated, steps, rate=rate, decay=True)
        loss = bench.held_out_loss(whole=True)
        losses.append(loss if np.isfinite(loss) else np.inf)
    return float(min(losses))
