"""Relax's operators -> ours: one function each, found by Relax's name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pocktvm.autodiff.ops import Emitter, Expr
from pocktvm.registry import entry

# (call, args, emitter) -> the value, or a tuple of values; args are already ours
Lowering = Callable[[Any, Sequence[Expr], Emitter], "Expr | tuple[Expr, ...]"]

LOWERINGS: dict[str, Lowering] = {}


def lower(*names: str) -> Callable[[Lowering], Lowering]:
    """Register the function that writes these Relax operators in our vocabulary."""
    return entry(LOWERINGS, *names)


def axes_of(value: Any, rank: int) -> tuple[int, ...]:
    """Relax's axis attribute (None: all of them) as sorted, non-negative axes."""
    if value is None:
        return tuple(range(rank))
    values = (value,) if isinstance(value, int) else tuple(value)
    return tuple(sorted(int(a) % rank for a in values))
