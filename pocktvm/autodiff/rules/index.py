"""Gradients of reading by index: adding at the same indices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pocktvm.autodiff.ops import Emitter, Expr, attrs_of, shape_of
from pocktvm.autodiff.rules.registry import gradient


@gradient("take")
def take_grad(call: Any, out: Expr, dout: Expr, e: Emitter) -> Sequence[Any]:
    """Rows of dout added to the rows they were read from; an embedding's padding row gets none."""
    table, indices = call.args
    attrs = attrs_of(call)
    kept = {"axis": attrs["axis"], "padding_idx": attrs.get("padding_idx", -1)}
    return [e.op("take_grad", dout, indices, shape=shape_of(table), **kept), None]


@gradient("gather_elements")
def gather_elements_grad(call: Any, out: Expr, dout: Expr, e: Emitter) -> Sequence[Any]:
    """dout added at the indices it was gathered from."""
    x, indices = call.args
    dx = e.op("scatter_add_elements", dout, indices, shape=shape_of(x), **attrs_of(call))
    return [dx, None]
