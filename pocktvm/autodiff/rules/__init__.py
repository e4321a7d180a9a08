"""Gradients: one decorated function an operator, one file a family."""

from pocktvm.autodiff.rules import (  # noqa: F401  (imported for their registrations)
    elementwise,
    index,
    linear,
    loss,
    norm,
    reduce,
    shape,
    spatial,
)
from pocktvm.autodiff.rules.registry import RULES, gradient

__all__ = ["RULES", "gradient"]
