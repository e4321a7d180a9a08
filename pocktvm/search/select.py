"""The best choice of tensors under a budget.

For each depth of bias training, which shares of which weights: an exact multiple-choice knapsack
over the contributions (they are taken as additive, as PockEngine does) with modelled costs, whose
capacity is then moved until the *planner's* bytes just fit. Every choice that was planned is a
point; the frontier is what no other point beats in gain, bytes and work. Other plausible choices
within the same limits (`finalists`) are for finals.py, which trains each as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from pocktvm.errors import PockError
from pocktvm.ir.scheme import Scheme
from pocktvm.search.candidates import ALL, SHARES, Candidates
from pocktvm.search.curve import smoothed
from pocktvm.search.planner import Cost, Planner
from pocktvm.search.table import Table
from pocktvm.units import format_bytes

PROXIES = ("fisher", "grad-norm")  # methods whose scores carry no noise of trials
BINS = 200  # of the knapsack's capacity
ROUNDS = 8  # of moving it, at most
UNUSED = 0.03  # of the bytes: more than that a choice should not leave
BETWEEN = (0.15, 0.4, 0.7)  # of the way from the smallest plan to the chosen one


@dataclass(frozen=True)
class Choice:
    """A planned scheme: what learns, what it is expected to gain, what it costs."""

    depth: str
    weights: Mapping[str, float]  # name -> share
    updated: Mapping[str, float]
    gain: float
    cost: Cost

    def beats(self, other: Choice) -> bool:
        """At least as good in everything, better in something."""
        mine = (-self.gain, self.cost.total_bytes, self.cost.work)
        theirs = (-other.gain, other.cost.total_bytes, other.cost.work)
        return mine != theirs and all(a <= b for a, b in zip(mine, theirs, strict=True))


@dataclass(frozen=True)
class Recipe:
    """How a finalist comes about: biases to a depth, `base` weights in any case, and of the others
    what gains most in the rest of the memory; `even`: as if all weights gained alike."""

    name: str
    depth: str
    base: Mapping[str, float]
    even: bool = False


@dataclass(frozen=True)
class Limits:
    """What a choice may cost; None: anything."""

    total_bytes: int | None = None
    work: float | None = None

    def hold(self, cost: Cost) -> bool:
        """True when the cost is within them."""
        return (self.total_bytes is None or cost.total_bytes <= self.total_bytes) and (
            self.work is None or cost.work <= self.work
        )

    def used(self, cost: Cost) -> bool:
        """True when hardly any of the bytes are left."""
        return self.total_bytes is not None and cost.total_bytes > (1 - UNUSED) * self.total_bytes


def check_smallest(planner: Planner, candidates: Candidates, limits: Limits) -> None:
    """PockError when even the classifier alone costs more than the limits."""
    cost = planner.cost(candidates.head)
    if not Limits(limits.total_bytes).hold(cost):
        cost = planner.least(candidates.head, limits.total_bytes or 0)
    if limits.total_bytes is not None and cost.total_bytes > limits.total_bytes:
        raise PockError(
            f"the budget {format_bytes(limits.total_bytes)} is below the smallest plan: training "
            f"the classifier alone needs {format_bytes(cost.total_bytes)} on "
            f"{planner.target.name} (arena {format_bytes(cost.arena_bytes)}).\n"
            "  Give it more, a smaller --batch, or a smaller input."
        )
    if limits.work is not None and cost.work > limits.work:
        raise PockError(
            "the time is below that of the smallest step, which trains the classifier alone.\n"
            "  Give it more, a smaller --batch, or a smaller input."
        )


class Selector:
    """Chooses from a table of contributions; `points` is every choice that was planned."""

    def __init__(
        self,
        table: Table,
        candidates: Candidates,
        planner: Planner,
        progress: Callable[[str, str], None] | None = None,
    ) -> None:
        self.table, self.candidates, self.planner = table, candidates, planner
        self.progress = progress
        self.points: list[Choice] = []
        states = sum(s in str(planner.optimizer) for s in ("adam", "momentum", "nesterov", "lion"))
        self._states = 2 if "adam" in str(planner.optimizer) else states
        self._activations = planner.activation_bytes()
        self._gains = self._contributions()

    def best(self, limits: Limits) -> Choice:
        """The choice with the largest gain within the limits; the classifier alone where nothing
        fits (code is estimated: whether that fits is for the build to say)."""
        found = [c for d in self._depths() if (c := self._at_depth(d, limits)) is not None]
        found = found or [self._plan("0", {})]
        return max(found, key=lambda c: (c.gain, -c.cost.total_bytes, -c.cost.work))

    def explore(self, best: Choice) -> None:
        """Plan choices between the smallest scheme and the best one, for the frontier."""
        least = self._plan("0", {}).cost.total_bytes
        most = best.cost.total_bytes
        for share in BETWEEN:
            if (bound := int(least + share * (most - least))) > least:
                self.best(Limits(bound))

    def frontier(self, chosen: Choice) -> list[Choice]:
        """Planned choices that none beats, by bytes; of equals, `chosen`."""
        points = [p for p in self.points if not any(q.beats(p) for q in self.points)]
        unique = {(p.gain, p.cost): p for p in [*points, chosen]}
        return sorted(unique.values(), key=lambda c: (c.cost.total_bytes, -c.gain))

    def _depths(self) -> list[str]:
        """Depths by what they could gain at most."""

        def bound(depth: str) -> float:
            best: dict[str, float] = {}
            for name, _, gain in self._items(depth):
                best[name] = max(gain, best.get(name, 0.0))
            return self._bias_gain(depth) + sum(best.values())

        return sorted(self.candidates.depths, key=bound, reverse=True)

    def _bias_gain(self, depth: str) -> float:
        row = self.table.rows.get(("bias", depth, 1.0))
        return 0.0 if row is None else row.gain

    def _contributions(self) -> dict[tuple[str, float], float]:
        """(weight, share) -> gain. Where trials measured it, it carries noise, and what the other
        shares of a weight gained says as much about it."""
        rows = [r for r in self.table.rows.values() if r.kind == "weight"]
        found = {(r.name, r.share): r.gain for r in rows if r.name in self.candidates.weights}
        return found if self.table.facts.get("method") in PROXIES else smoothed(found, SHARES)

    def _items(
        self, depth: str, even: bool = False, fill: bool = False
    ) -> list[tuple[str, float, float]]:
        """(weight, share, gain) a backward pass of that depth comes by, where there is a gain;
        with `fill` also where none was seen, at next to nothing, for room that is left."""
        nothing = 1e-3 * min((gain for gain in self._gains.values() if gain > 0), default=1.0)
        found = []
        for (name, share), gain in self._gains.items():
            if self.candidates.reaches(depth, name) and (gain > 0 or even or fill):
                alike = share**0.5 * (1.0 if even else nothing)
                found.append((name, share, alike if even or gain <= 0 else gain))
        return found

    def finalists(self, limits: Limits) -> list[tuple[Recipe, Choice]]:
        """Different choices within the limits, each with how it comes about; the one with the
        largest sum of contributions first."""
        best = self.best(limits)
        recipe = Recipe("contributions", best.depth, {})
        found = [(recipe, self.make(recipe, limits) or best)]
        spread = [Recipe("contributions", depth, {}) for depth in self._spread()]
        for recipe in [*self._published(limits), *self._whole(limits), *spread]:
            choice = self.make(recipe, limits)
            if choice is not None and all(choice.updated != c.updated for _, c in found):
                found.append((recipe, choice))
        return found

    def make(self, recipe: Recipe, limits: Limits) -> Choice | None:
        """The choice of a recipe; None where its base exceeds the limits. What few steps saw no
        gain of may still learn something in many: a budget is filled."""
        items = self._items(recipe.depth, recipe.even, fill=limits.total_bytes is not None)
        items = [item for item in items if item[0] not in recipe.base]
        return self._grown(recipe.depth, recipe.base, items, limits)

    def _spread(self) -> list[str]:
        """Depths apart from each other: a quarter of the blocks, half of them, and so on."""
        blocks = len(self.candidates.model.blocks)
        depths = [*(str(round(blocks * part)) for part in (0.25, 0.5, 0.75)), ALL]
        return [d for d in dict.fromkeys(depths) if d in self.candidates.depths]

    def _published(self, limits: Limits) -> list[Recipe]:
        """The published scheme, its weights at the largest share that fits, and more where there
        is room; and its depth with any weights, evenly."""
        learns = Scheme.pockengine().resolve(self.candidates.model)
        measured = {name for name, _ in self._gains}
        weights = {n: float(p) for n, p in learns.items() if n in measured}
        biases = set(learns) - set(self.candidates.weights)
        depths = [d for d in self.candidates.depths if self._covers(d, biases, weights)]
        if not depths:
            return []
        even = Recipe("even", depths[0], {}, even=True)
        for share in SHARES:
            base = {n: max(min(SHARES), share * p) for n, p in weights.items()}
            if limits.hold(self._plan(depths[0], base).cost):
                return [Recipe("published", depths[0], base), even]
        return [even]

    def _whole(self, limits: Limits) -> list[Recipe]:
        """Everything in the last blocks, as many as fit: of every weight, or of a share of its
        channels, the smaller the deeper. Nothing measured goes into these, so that no noise
        does."""
        found = []
        for share in SHARES:
            for depth in reversed([d for d in self.candidates.depths if d not in ("0", ALL)]):
                names = (n for n in self.candidates.weights if self.candidates.reaches(depth, n))
                base = dict.fromkeys(names, share)
                if limits.hold(self._plan(depth, base).cost):
                    found.append(Recipe("blocks", depth, base))
                    break
        return found

    def _covers(self, depth: str, biases: set[str], weights: Iterable[str]) -> bool:
        return biases <= set(self.candidates.biases(depth)) and all(
            self.candidates.reaches(depth, name) for name in weights
        )

    def _at_depth(self, depth: str, limits: Limits) -> Choice | None:
        """The best choice of weights at a depth; its biases alone where no weights can make it
        better than a choice that is known."""
        known = max((p.gain for p in self.points if limits.hold(p.cost)), default=-np.inf)
        items = self._items(depth)
        best: dict[str, float] = {}
        for name, _, gain in items:
            best[name] = max(gain, best.get(name, 0.0))
        reachable = self._bias_gain(depth) + sum(best.values()) > known
        return self._grown(depth, {}, items if reachable else [], limits)

    def _grown(
        self,
        depth: str,
        base: Mapping[str, float],
        items: list[tuple[str, float, float]],
        limits: Limits,
    ) -> Choice | None:
        """The base and the best of the items: capacity by bisection on the planner's answer."""
        best = self._plan(depth, base)
        if not limits.hold(best.cost):
            return None
        if not items:
            return best
        costs = [self._modelled(name, share) for name, share, _ in items]
        # all there is goes past the knapsack: sizes rounded up to its bins would leave some out
        most = {name: share for name, share, _ in sorted(items, key=lambda item: item[2])}
        low, high = 0.0, float(sum(costs))
        whole = self._plan(depth, {**base, **most})
        if limits.hold(whole.cost):
            return whole
        for _ in range(ROUNDS):
            middle = (low + high) / 2
            choice = self._plan(depth, {**base, **self._chosen(items, costs, middle)})
            if limits.hold(choice.cost):
                low, best = middle, choice
                if limits.used(choice.cost):
                    break
            else:
                high = middle
        return best

    def _modelled(self, name: str, share: float) -> float:
        """Bytes, more or less: state and gradient, and the slice of the activation."""
        nbytes = self.planner.model.parameters[name].value.size * 4
        return share * (nbytes * (1 + self._states) + self._activations.get(name, 0))

    def _chosen(
        self, items: list[tuple[str, float, float]], costs: list[float], capacity: float
    ) -> dict[str, float]:
        """Weight -> share with the largest sum of gains within a capacity (dynamic programme)."""
        unit = max(capacity / BINS, 1e-9)
        names = list(dict.fromkeys(name for name, _, _ in items))
        gains = np.zeros(BINS + 1)
        picks: list[np.ndarray] = []
        for name in names:
            options = [i for i, item in enumerate(items) if item[0] == name]
            new, pick = gains.copy(), np.full(BINS + 1, -1)
            for i in options:
                size = int(np.ceil(costs[i] / unit - 1e-9))
                if size > BINS:
                    continue
                moved = np.full(BINS + 1, -np.inf)
                moved[size:] = gains[: BINS + 1 - size] + items[i][2]
                better = moved > new
                new, pick = np.where(better, moved, new), np.where(better, i, pick)
            gains = new
            picks.append(pick)
        chosen: dict[str, float] = {}
        at = BINS
        for pick in reversed(picks):
            if (i := int(pick[at])) >= 0:
                chosen[items[i][0]] = items[i][1]
                at -= int(np.ceil(costs[i] / unit - 1e-9))
        return chosen

    def _plan(self, depth: str, weights: Mapping[str, float]) -> Choice:
        updated = dict(self.candidates.biases(depth))
        updated |= {name: self.candidates.part(name, share) for name, share in weights.items()}
        gains = [max(0.0, self._gains.get(item, 0.0)) for item in weights.items()]
        gain = math.fsum([self._bias_gain(depth), *gains])  # the same in any order
        if self.progress:
            self.progress("plan schemes", f"{self.planner.planned + 1}")
        choice = Choice(depth, dict(weights), updated, gain, self.planner.cost(updated))
        self.points.append(choice)
        return choice
