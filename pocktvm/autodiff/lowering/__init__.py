"""Relax as frontends write it, rewritten into the vocabulary of `ir/ops.py` before autodiff."""

from pocktvm.autodiff.lowering import (  # noqa: F401  (imported for their registrations)
    attention,
    create,
    elementwise,
    index,
    linear,
    norm,
    reduce,
    shape,
    spatial,
)
from pocktvm.autodiff.lowering.registry import LOWERINGS, lower

__all__ = ["LOWERINGS", "lower"]
