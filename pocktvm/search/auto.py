"""From a model and data, or an analysis, to a scheme within a budget: what `--scheme auto` does."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pocktvm.build import Build, Progress
from pocktvm.errors import PockError
from pocktvm.ir.model import Model
from pocktvm.ir.scheme import Scheme
from pocktvm.search.candidates import Candidates, find_candidates
from pocktvm.search.finals import gains_of, hold_final, judged, winner
from pocktvm.search.planner import Planner
from pocktvm.search.select import UNUSED, Choice, Limits, Recipe, Selector, check_smallest
from pocktvm.search.table import Table
from pocktvm.units import format_bytes

ATTEMPTS = 4  # choose, plan what was chosen, choose again within what that left


@dataclass(frozen=True)
class Finalist:
    """How a choice came about, and what it gained over the classifier alone when it was trained as
    a whole: `gains`, a round of the final each, as many as it was in."""

    recipe: str
    choice: Choice
    gains: list[float]


@dataclass(frozen=True)
class Found:
    """A search's result: the choice, the frontier it stands on, the table it came from."""

    choice: Choice
    frontier: list[Choice]
    table: Table
    candidates: Candidates
    pace: float  # modelled seconds per second of the roofline
    planned_bytes: int  # of the choice, its kernels compiled
    finalists: list[Finalist]

    def seconds(self, choice: Choice) -> float:
        """Modelled time of a step: its roofline, for this machine at the pace measured here."""
        return choice.cost.work * self.pace

    def mapping(self) -> dict[str, Any]:
        """The scheme: tensor -> 1 or the share of its input channels."""
        found = {}
        for name in self.choice.updated:
            share = self.choice.weights.get(name, 1.0)
            found[name] = int(share) if share == 1 else share
        return found


def search(
    build: Build,
    *,
    settings: Any = None,
    step_seconds: float | None = None,
    progress: Progress | None = None,
    explore: bool = False,
) -> Found:
    """Analyse (`build.samples`) or read `build.analysis`, and choose within `build.limit` bytes.

    `step_seconds` bounds the modelled time of a step; `explore` plans smaller schemes, too, so that
    the frontier shows what the budget buys. Raises PockError for a budget below the
    smallest plan, before anything is measured, and for data no analysis can be made of.
    """
    from pocktvm.search.analysis import analyse
    from pocktvm.search.study import Settings, Study, checked_samples
    from pocktvm.search.trials import opened

    settings = settings or Settings()
    full = replace(build, scheme=Scheme.full())
    model, _ = full.resolve()
    candidates = find_candidates(model, settings.only)
    planner = Planner(model, build.loss, build.optimizer, build.target)
    check_smallest(planner, candidates, Limits(build.limit))
    if build.samples is None:
        table = _finished(build, model)
    else:
        arrays = checked_samples(build, model, build.samples)
        study = Study(full, model, candidates, settings, arrays)
        path = Path(build.analysis) if build.analysis else default_path(study.facts())
        study = replace(study, path=path)
        table = analyse(study, progress)
    exact = Planner(
        model, build.loss, build.optimizer, build.target, float(table.facts["kernel_bytes"])
    )
    selector = Selector(table, candidates, exact, progress)
    pace = 1.0
    if build.target.is_host:
        pace = float(table.facts["step_seconds"] / table.facts["full_work"])
    limits = Limits(build.limit, None if step_seconds is None else step_seconds / pace)
    finalists = selector.finalists(limits)
    choices = [choice for _, choice in finalists]
    if build.samples is not None and not judged(table, choices):
        # it trains, whatever measured contributions
        trains = replace(study, settings=replace(settings, method="finetune"))
        with opened(trains, progress) as (bench, _):
            hold_final(bench, candidates.head, table, choices, progress)
    if build.samples is not None:
        study.forget()
    first = winner(table, choices) if judged(table, choices) else 0
    choice, planned = _fitting(selector, *finalists[first], limits, progress)
    if explore:
        selector.explore(choice)
    told = [Finalist(recipe.name, c, gains_of(table, c)) for recipe, c in finalists]
    return Found(choice, selector.frontier(choice), table, candidates, pace, planned, told)


def _fitting(
    selector: Selector, recipe: Recipe, choice: Choice, limits: Limits, progress: Progress | None
) -> tuple[Choice, int]:
    """The choice of a recipe whose plan, kernels compiled, is within the limit and uses it, and
    that plan's bytes. Choices are compared by estimates: what those miss of the real plan is taken
    off the limit, what they say too much is added to it."""
    missed, limit = 0, limits.total_bytes
    for _ in range(ATTEMPTS):
        planned = selector.planner.plan(choice.updated, progress)
        if limit is None or planned <= limit or (choice.depth, choice.weights) == ("0", {}):
            break
        missed = max(missed + 1, planned - choice.cost.total_bytes)
        less = replace(limits, total_bytes=max(0, limit - missed))
        choice = selector.make(recipe, less) or selector.best(less)
    if limit is None or planned > limit:
        return choice, planned
    return _enlarged(selector, recipe, (choice, planned), limits, progress)


def _enlarged(
    selector: Selector,
    recipe: Recipe,
    found: tuple[Choice, int],
    limits: Limits,
    progress: Progress | None,
) -> tuple[Choice, int]:
    """The recipe's choice with what the plan of `found` leaves of the limit, where that fits."""
    assert limits.total_bytes is not None
    share = 1.0  # of what is left, that is taken to be there
    for _ in range(ATTEMPTS):
        choice, planned = found
        left = limits.total_bytes - planned
        if left < UNUSED * limits.total_bytes:
            break
        more = replace(limits, total_bytes=choice.cost.total_bytes + int(share * left))
        larger = selector.make(recipe, more)
        if larger is None or larger.cost.total_bytes <= choice.cost.total_bytes:
            break
        took = selector.planner.plan(larger.updated, progress)
        if took <= limits.total_bytes:
            found = larger, took
        else:
            share /= 2
    return found


def default_path(facts: Mapping[str, Any]) -> Path:
    """Where an analysis without a name of its own lies: one file for all that decides it."""
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]
    return Path("build") / "analysis" / f"{facts['model']}-{facts['method']}-{key}.jsonl"


def _finished(build: Build, model: Model) -> Table:
    """An analysis of this very model that needs no data any more."""
    from pocktvm.search.analysis import SETTLED
    from pocktvm.search.study import model_facts

    analysis = build.analysis
    if analysis is None:
        raise PockError(
            "the scheme 'auto' is chosen from an analysis of your data, which this build was not "
            "given.\n  Add --data F, or --analysis FILE of an earlier `pocktvm scheme`; or name "
            "what learns (--scheme pockengine, bias:N, blocks:N or a TOML)."
        )
    table = Table.read(Path(analysis))
    facts = model_facts(build, model)
    # another batch or optimizer costs other bytes, which are planned anew; what helps stays
    wrong = [k for k in ("parameters", "loss") if table.facts.get(k) != facts[k]]
    if wrong:
        raise PockError(
            f"{analysis} analyses something else: it has {wrong[0]} = "
            f"{table.facts.get(wrong[0])!r}, this build {facts[wrong[0]]!r}."
        )
    if not table.rows or any(key not in table.facts for key in SETTLED):
        raise PockError(f"{analysis} is not finished: give --data F to go on with it.")
    return table


def automatic_scheme(build: Build, progress: Progress | None = None) -> Scheme:
    """The scheme `auto` stands for in this build."""
    return Scheme(search(build, progress=progress).mapping(), name="auto")


def to_toml(found: Found, target: str, limit: int | None) -> str:
    """The chosen scheme as a file that `--scheme` reads."""
    choice, facts = found.choice, found.table.facts
    about = {
        "model": facts["model"], "target": target, "method": facts["method"],
        "optimizer": facts["optimizer"], "expected_gain": round(choice.gain, 6),
        "plan_bytes": found.planned_bytes,
        **({} if limit is None else {"budget_bytes": limit}),
    }  # fmt: skip
    lines = ["[about]", *(f"{k} = {json.dumps(v)}" for k, v in about.items()), "", "[update]"]
    lines += [f"{json.dumps(name)} = {share}" for name, share in found.mapping().items()]
    return "\n".join(lines) + "\n"


def told(choice: Choice) -> str:
    """A choice in a few words."""
    depth = "every bias" if choice.depth == "all" else f"biases of {choice.depth} blocks"
    return f"{depth}, {len(choice.weights)} weights, {format_bytes(choice.cost.total_bytes)}"
