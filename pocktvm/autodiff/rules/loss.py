"""Gradient of the cross-entropy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pocktvm.autodiff.ops import Emitter, Expr, attrs_of, shape_of
from pocktvm.autodiff.rules.registry import gradient


@gradient("cross_entropy")
def cross_entropy_grad(call: Any, out: Expr, dout: Expr, e: Emitter) -> Sequence[Any]:
    """dlogits = dloss * (softmax(logits) - target) * weight / total weight, 0 where ignored."""
    logits, y, *weight = call.args
    attrs = attrs_of(call)
    grad = e.op("cross_entropy_grad", logits, y, dout, *weight, shape=shape_of(logits), **attrs)
    return [grad, *[None] * (len(call.args) - 1)]
