"""Gradient rules: one function an operator, `@gradient("softmax")`.

A rule is `(call, out, dout, e) -> partials`, one partial for each operand of `call`: an expression,
None where there is no gradient, or a function that writes it, called only when that operand needs
its gradient. Names are ours (ir/ops.py), or `relax.<name>` for an operator that stays Relax's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import FunctionType
from typing import Any

from pocktvm.autodiff.ops import NAMES, PREFIX, Emitter, Expr, layer_and_name
from pocktvm.registry import entry
from pocktvm.tvm_api import relax

Partial = "Expr | None | Callable[[], Expr]"
Rule = Callable[[Any, Expr, Expr, Emitter], Sequence[Any]]

RULES: dict[str, Rule] = {}

# names of the variables whose gradient the differentiation under way needs
_NEEDED: ContextVar[frozenset[str]] = ContextVar("needed", default=frozenset())


def gradient(*names: str) -> Callable[[Rule], Rule]:
    """Register the gradient of these operators."""

    enter = entry(RULES, *names)

    def register(rule: Rule) -> Rule:
        for name in names:
            _register(name if name.startswith("relax.") else PREFIX + name)
        return enter(rule)

    return register


def ensure_registered(relax_name: str) -> None:
    """TVM refuses an operator without a rule even where no gradient is asked of it; one that
    matters is reported by differentiate before."""
    _register(relax_name)


@contextmanager
def needing(names: frozenset[str]) -> Iterator[None]:
    """While open, rules write the gradients of these variables and no others."""
    token = _NEEDED.set(names)
    try:
        yield
    finally:
        _NEEDED.reset(token)


def _needs(arg: Any) -> bool:
    if isinstance(arg, relax.Tuple):
        return any(_needs(f) for f in arg.fields)
    return isinstance(arg, relax.Var) and arg.name in _NEEDED.get()


def _register(full_name: str) -> None:
    if full_name in _registered:
        return
    _registered.add(full_name)
    name = full_name.removeprefix(PREFIX)

    def primal_gradient(var: Any, call: Any, dout: Any, builder: Any) -> list[Expr]:
        wanted = [_needs(a) for a in call.args]
        partials: Sequence[Any] = [None] * len(call.args)
        if any(wanted):
            e = Emitter(builder, layer_and_name(var.name)[0], "_grad")
            partials = RULES[name](call, var, dout, e)
        return [
            (p() if isinstance(p, FunctionType) else p)
            if wants and p is not None
            else relax.op.grad.no_grad(arg)
            for p, wants, arg in zip(partials, wanted, call.args, strict=True)
        ]

    relax.op.base.register_gradient(full_name, primal_gradient, level=15)


_registered: set[str] = set()
for _name in NAMES:
    _register(PREFIX + _name)
