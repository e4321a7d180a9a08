"""An artifact's facts as text, for `build` and `inspect`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pocktvm.units import format_bytes


def show(facts: Mapping[str, Any], *, tensors: int = 8) -> None:
    """Print a summary (pocktvm/manifest.py); `tensors` names of updated tensors at most."""
    plan, kernels = facts["plan"], facts["kernels"]
    print(f"{facts['artifact']}: {facts['model']} for {facts['target']}, batch {facts['batch']}")
    print(_training(facts))
    print()
    print("memory")
    for kind, nbytes in plan["by_class"].items():
        print(f"  {kind:12} {format_bytes(nbytes):>10}")
    print(f"  {'arena':12} {format_bytes(plan['arena_bytes']):>10}   one block, fixed offsets")
    if plan.get("fast_bytes"):
        print(f"  {'fast':12} {format_bytes(plan['fast_bytes']):>10}   the arena's end, on chip")
    print(f"  {'lower bound':12} {format_bytes(plan['lower_bound_bytes']):>10}   live at the peak")
    print(f"  {'total':12} {format_bytes(plan['total_bytes']):>10}   with frozen weights and code")
    print()
    counts = ", ".join(f"{kernels[kind]} {kind}" for kind in ("tuned", "rule", "fallback"))
    untuned = kernels.get("untuned", 0)
    hint = f"   ({untuned} calls have knobs and no record: pocktvm tune)" if untuned else ""
    print(f"kernels: {counts}{hint}")
    rules = facts.get("rules") or {}
    if rules:
        print("  " + ", ".join(f"{rule} {count}" for rule, count in rules.items()))
    updated = facts["updated"]
    print(f"updated: {len(updated)} tensors")
    for name, share in list(updated.items())[:tensors]:
        print(f"  {name}" + ("" if share == 1 else f"  ({share:.0%} of it)"))
    if len(updated) > tensors:
        print(f"  … and {len(updated) - tensors} more (pocktvm inspect --json lists them)")
    if facts.get("trade"):
        print(f"trade: {facts['trade']['text']}")
    for notice in facts.get("notices") or ():
        print(f"note: {notice}")


def _training(facts: Mapping[str, Any]) -> str:
    words = [f"scheme {facts['scheme']}"]
    words += [f"{key} {facts[key]}" for key in ("loss", "optimizer", "lr") if key in facts]
    if facts.get("saved", "float32") != "float32":
        words.append(f"saved activations {facts['saved']}")
    return ", ".join(words)
