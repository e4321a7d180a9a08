"""Reading by index: embeddings, take, gather."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pocktvm.autodiff.lowering.registry import lower
from pocktvm.autodiff.ops import Emitter, Expr, dtype_of, plain, shape_of
from pocktvm.tvm_api import relax


@lower("relax.take")
def take(call: Any, args: Sequence[Expr], e: Emitter) -> Expr:
    """Rows of a table along an axis; indices of any rank. A row named by `padding_idx` gets no
    gradient."""
    table, indices = args[:2]
    axis = (plain(call.attrs.axis) or 0) % len(shape_of(table))
    attrs = {"axis": axis, "mode": str(call.attrs.mode)}
    attrs["padding_idx"] = e.padding.get(table.name) if isinstance(table, relax.Var) else None
    return e.op("take", table, indices, shape=shape_of(call), dtype=dtype_of(table), **attrs)


@lower("relax.gather_elements")
def gather_elements(call: Any, args: Sequence[Expr], e: Emitter) -> Expr:
    """torch.gather: along one axis, element i of x where the indices say i."""
    x, indices = args
    axis = int(call.attrs.axis) % len(shape_of(x))
    return e.op("gather_elements", x, indices, shape=shape_of(call), dtype=dtype_of(x), axis=axis)


@lower("relax.index_tensor")
def index_tensor(call: Any, args: Sequence[Expr], e: Emitter) -> Expr:
    """x[indices] of leading axes: one take over the axes flattened into one.

    Index tensors broadcast against each other; the flat index is their mixed-radix number.
    """
    x, indices = args[0], list(args[1])
    shape = shape_of(x)
    flat = None
    for size, index in zip(shape, indices, strict=False):
        index = e.astype(index, "int32")
        wrapped = e.where(e.binary("less", index, 0), e.add(index, size), index)
        flat = wrapped if flat is None else e.add(e.multiply(flat, size), wrapped)
    rows = 1
    for size in shape[: len(indices)]:
        rows *= size
    table = e.reshape(x, (rows, *shape[len(indices) :]))
    attrs = {"axis": 0, "mode": "fast"}
    return e.op("take", table, flat, shape=shape_of(call), dtype=dtype_of(x), **attrs)
