"""The last step of a search: train the likely choices as a whole, for longer, and take the best.

Contributions are of single tensors, measured in a few steps; that they add up is an assumption. A
final drops it: every finalist trains from the same start, at rates that fall to zero, on the same
samples; what counts is the lower loss on the held-out ones. What learns much needs its time, and in
few steps a low rate: at a high one, forty steps of a few biases look better than those of whole
blocks. So this halves: all train for a while, the better half again and longer, the best of those
much longer and at more rates, and one of them wins (successive halving, Jamieson and Talwalkar
2016). The classifier alone is in every round, as what gains are told against.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pocktvm.search.bench import Bench
from pocktvm.search.select import Choice
from pocktvm.search.table import Row, Table


@dataclass(frozen=True)
class Round:
    """`keep`: how many enter, the best of the round before (None: all); `length`: of a fit, in
    steps of the first round's; `rates`: fits, each at so many times the optimizer's rate."""

    kind: str
    keep: int | None
    length: int
    rates: tuple[float, ...]


ROUNDS = (
    Round("joint", None, 1, (0.3,)),
    Round("joint longer", 6, 2, (0.3, 0.1)),
    Round("joint longest", 3, 5, (1.0, 0.3, 0.1)),
)
ENTRANTS = 12  # about as many, with the classifier alone

Progress = Callable[[str, str], None]


def rounds_worth() -> int:
    """How many times the steps of a first round's fit a final takes, about."""
    fits = ((ENTRANTS if r.keep is None else r.keep + 1, r) for r in ROUNDS)
    return sum(entrants * r.length * len(r.rates) for entrants, r in fits)


def key_of(choice: Choice, kind: str = ROUNDS[0].kind) -> tuple[str, str, float]:
    """The row of a finalist: what learns, in short; the digest tells it from all others."""
    text = json.dumps([choice.depth, sorted(choice.weights.items())])
    name = f"{choice.depth} blocks, {len(choice.weights)} weights, "
    return kind, name + hashlib.sha256(text.encode()).hexdigest()[:12], 1.0


def judged(table: Table, choices: Sequence[Choice]) -> bool:
    """True when the table has the results of every round's entrants."""
    return all(
        (entrants := _entrants(table, choices, place)) is not None
        and not table.missing([key_of(c, r.kind) for c in entrants])
        for place, r in enumerate(ROUNDS)
    )


def gains_of(table: Table, choice: Choice) -> list[float]:
    """What a finalist gained over the classifier alone in the rounds it was in."""
    rows = (table.rows.get(key_of(choice, r.kind)) for r in ROUNDS)
    return [row.gain for row in rows if row is not None]


def winner(table: Table, choices: Sequence[Choice]) -> int:
    """The place of the one that did best in the last round; of equals the first."""
    last = _entrants(table, choices, len(ROUNDS)) or []
    return choices.index(last[0]) if last else 0


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
    for place in range(len(ROUNDS)):
        _hold(bench, head, table, _entrants(table, choices, place) or [], place, progress)


def _entrants(table: Table, choices: Sequence[Choice], place: int) -> list[Choice] | None:
    """Who enters a round: the best of the one before, the best first, of equals those named first.
    One place behind the last round: its own order. None where the one before was not held."""
    if place == 0:
        return list({key_of(c): c for c in choices}.values())
    before = _entrants(table, choices, place - 1)
    kind = ROUNDS[place - 1].kind
    if before is None or table.missing([key_of(c, kind) for c in before]):
        return None
    keep = ROUNDS[place].keep if place < len(ROUNDS) else None
    return sorted(before, key=lambda c: -table.rows[key_of(c, kind)].gain)[:keep]


def _hold(
    bench: Bench,
    head: Mapping[str, float],
    table: Table,
    entrants: Sequence[Choice],
    place: int,
    progress: Progress | None,
) -> None:
    """A row for each entrant that has none: how much lower than the classifier alone it ends."""
    this = ROUNDS[place]
    steps = this.length * int(table.facts["final_steps"])
    left = [c for c in entrants if key_of(c, this.kind) not in table.rows]
    if not left:
        return
    alone = _lowest(bench, head, steps, this.rates)
    for number, choice in enumerate(left):
        if progress:
            told = f"{number + 1}/{len(left)}, {steps} steps"
            progress(f"finalists, round {place + 1} of {len(ROUNDS)}", told)
        began = time.monotonic()
        loss = _lowest(bench, choice.updated, steps, this.rates)
        gain = alone - loss if np.isfinite(loss) else -1e9  # it diverged
        row = Row(*key_of(choice, this.kind), float(gain), round(time.monotonic() - began, 3))
        table.add(row)


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
