"""Does the plan fit what the device was given? If not: where the peak is, and what would help."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pocktvm.errors import PockError
from pocktvm.ir.memory import MemoryPlan
from pocktvm.units import format_bytes

Suggestions = Mapping[str, Callable[[], int]]


def check_budget(
    plan: MemoryPlan,
    budget_bytes: int | None,
    *,
    target: str = "the target",
    source: str = "--budget",
    at_least: bool = False,
    suggestions: Suggestions | None = None,
) -> None:
    """Raise PockError unless `plan.total_bytes` is within the budget.

    `at_least`: the plan is an estimate from below (memory/estimate.py).
    `suggestions`: a change the user can make ("batch 8 -> 4") -> a function that says how many
    bytes it saves. They are called only when the budget is exceeded, since each is a build of its
    own; what raises PockError or saves nothing is left out, the best three are printed.
    """
    if budget_bytes is None or plan.total_bytes <= budget_bytes:
        return
    peak = plan.lower_bound_bytes
    needs = ("at least " if at_least else "") + format_bytes(plan.total_bytes)
    raise PockError(
        f"the plan needs {needs}, {target} was given {format_bytes(budget_bytes)} "
        f"({source}); the peak is at '{plan.peak_call}' ({format_bytes(peak)} live).\n"
        f"  {_by_class(plan)}\n"
        f"  {_savings(plan, budget_bytes, suggestions or {})}"
    )


def _by_class(plan: MemoryPlan) -> str:
    code = plan.total_bytes - plan.arena_bytes - plan.by_class.get("frozen", 0)
    parts = {**plan.by_class, "code": code}
    return "It holds: " + ", ".join(f"{k} {format_bytes(v)}" for k, v in parts.items() if v) + "."


def _savings(plan: MemoryPlan, budget: int, suggestions: Suggestions) -> str:
    saved: list[tuple[int, str]] = []
    for change, saved_bytes in suggestions.items():
        try:
            saving = saved_bytes()
        except PockError:
            continue
        # A later one of the same kind trains less: it must be worth it.
        same = [s for s, c in saved if c.split()[0] == change.split()[0]]
        if saving > 1.01 * max(same, default=0):
            saved.append((saving, change))
    if not saved:
        return "Train fewer tensors (--scheme last), or give it a smaller batch (--batch)."
    best = sorted(saved, reverse=True)[:3]
    text = "Largest savings: " + ", ".join(f"{c} (-{format_bytes(s)})" for s, c in best) + "."
    if not any(plan.total_bytes - saving <= budget for saving, _ in best):
        text += "\n  None of them is enough alone."
    return text
