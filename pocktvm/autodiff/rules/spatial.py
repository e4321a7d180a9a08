"""Gradients of pooling and resizing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pocktvm.autodiff.ops import Emitter, Expr, attrs_of, op_name, shape_of
from pocktvm.autodiff.rules.registry import gradient


@gradient("max_pool2d")
def max_pool2d_grad(call: Any, out: Expr, dout: Expr, e: Emitter) -> Sequence[Any]:
    """dout to the first maximum of each window. Keeps x."""
    x = call.args[0]
    return [e.op("max_pool2d_grad", dout, x, shape=shape_of(x), **attrs_of(call))]


@gradient("avg_pool2d", "resize2d")
def linear_window_grad(call: Any, out: Expr, dout: Expr, e: Emitter) -> Sequence[Any]:
    """Linear in x: dout spread with the forward's weights. Keeps nothing."""
    x = call.args[0]
    return [e.op(f"{op_name(call)}_grad", dout, shape=shape_of(x), **attrs_of(call))]
