"""What a mask says of an element, and masks of one element a byte (passes/save_masks.py).

Several channels a byte are no expression of one element: schedule/bits.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pocktvm.schedule.elementwise_ops.table import Expr, bound, op
from pocktvm.schedule.emit import const
from pocktvm.tvm_api import tirx


def passes(y: Expr, attrs: Mapping[str, Any], width: int) -> Expr:
    """Where the gradient that a mask stands for is not zero: a vector of booleans."""
    if attrs["test"] == "relu":
        return y > const(0.0, width)
    if attrs["test"] == "relu6":
        return tirx.And(y > const(0.0, width), y < const(6.0, width))
    low, high = bound(attrs, "min"), bound(attrs, "max")
    found = const(True, width, "bool")
    if low is not None:
        found = y >= const(low, width)
    if high is not None:
        below = y <= const(high, width)
        found = below if low is None else tirx.And(found, below)
    return found


@op("pack_mask")
def pack_mask(a: list[Expr], attrs: Mapping[str, Any], width: int, dtype: str) -> Expr:
    """1 where the gradient passes."""
    one, zero = const(1, width, "uint8"), const(0, width, "uint8")
    return tirx.Select(passes(a[0], attrs, width), one, zero)


@op("apply_mask")
def apply_mask(a: list[Expr], attrs: Mapping[str, Any], width: int, dtype: str) -> Expr:
    """dout where the byte is not zero."""
    return tirx.Select(tirx.NE(a[1], const(0, width, "uint8")), a[0], const(0.0, width))
