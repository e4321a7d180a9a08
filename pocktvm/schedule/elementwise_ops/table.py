"""The table of elementwise operators: a name, and the function that emits its vector."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from pocktvm.registry import entry

Expr = Any
Emit = Callable[[list[Expr], Mapping[str, Any], int, str], Expr]
OPS: dict[str, Emit] = {}


def op(*names: str) -> Callable[[Emit], Emit]:
    """Register the emitter of one or more operators: (operands, attrs, width, dtype) -> vector.

    `dtype` is that of the result."""
    return entry(OPS, *names)


def bound(attrs: Mapping[str, Any], name: str) -> float | None:
    """A clip's bound; None where it is absent or infinite."""
    value = attrs.get(name)
    return None if value is None or not math.isfinite(value) else value
