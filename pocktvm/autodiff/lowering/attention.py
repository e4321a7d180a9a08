"""Attention, where a frontend keeps it as one operator: two products around a softmax."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from pocktvm.autodiff.lowering.registry import lower
from pocktvm.autodiff.ops import Emitter, Expr, constant, plain, shape_of


@lower("relax.nn.attention", "relax.nn.attention_bias")
def attention(call: Any, args: Sequence[Expr], e: Emitter) -> Expr:
    """softmax(q k^T * scale + bias) v; q, k, v are [batch, row, head, depth].

    Fewer key heads than query heads (grouped queries) share each key head between neighbours.
    """
    q, k, v = (e.permute(x, (0, 2, 1, 3)) for x in args[:3])
    k, v = (_shared_heads(x, shape_of(q)[1], e) for x in (k, v))
    scale = plain(call.attrs.scale)
    scale = 1.0 / math.sqrt(shape_of(q)[-1]) if scale is None else float(scale)
    scores = e.matmul(e.multiply(q, scale), k, tb=True)
    if len(args) > 3:
        scores = e.add(scores, args[3])
    causal = plain(call.attrs.causal_mask)
    if causal is not None:
        rows, columns = shape_of(scores)[-2:]
        offset = 0 if causal == "TopLeft" else columns - rows
        hidden = np.triu(np.full((rows, columns), -1e30, "float32"), offset + 1)
        scores = e.add(scores, constant(hidden))
    weights = e.unary("softmax", scores, axis=3)
    return e.permute(e.matmul(weights, v), (0, 2, 1, 3))


def _shared_heads(x: Expr, heads: int, e: Emitter) -> Expr:
    batch, have, rows, depth = shape_of(x)
    if have == heads:
        return x
    unit = e.reshape(x, (batch, have, 1, rows, depth))
    wide = e.broadcast_to(unit, (batch, have, heads // have, rows, depth))
    return e.reshape(wide, (batch, heads, rows, depth))
