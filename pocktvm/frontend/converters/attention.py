"""Norms and attention."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx

from pocktvm.frontend.converters.registry import (
    argument,
    const,
    converts,
    dropped,
    dtype_of,
    shape_of,
)
from pocktvm.tvm_api import relax

# exp(-1e30 - max) is exactly 0 like exp(-inf), and no kernel has to be careful with infinities.
MASKED = -1e30


@converts("native_group_norm.default")
def _group_norm(importer: Any, node: fx.Node) -> Any:
    x, channels = importer.env[node.args[0]], int(node.args[4])
    gain, shift = (
        const(np.full(channels, default), dtype_of(x)) if arg is None else importer.env[arg]
        for arg, default in zip(node.args[1:3], (1, 0), strict=True)
    )
    normed = relax.op.nn.group_norm(
        x,
        gain,
        shift,
        num_groups=int(node.args[6]),
        channel_axis=1,
        axes=list(range(2, len(shape_of(x)))),
        epsilon=float(node.args[7]),
    )
    return (importer.block_builder.emit(normed), None, None)


@converts("rms_norm.default")
def _rms_norm(importer: Any, node: fx.Node) -> Any:
    x = importer.env[node.args[0]]
    shape = [int(d) for d in node.args[1]]
    eps = argument(node, 3, "eps")
    eps = float(np.finfo("float32").eps) if eps is None else eps
    weight = argument(node, 2, "weight")
    gain = const(np.ones(shape), dtype_of(x)) if weight is None else importer.env[weight]
    axes = list(range(-len(shape), 0))
    return importer.block_builder.emit(relax.op.nn.rms_norm(x, gain, axes=axes, epsilon=eps))


@converts("scaled_dot_product_attention.default")
def _attention(importer: Any, node: fx.Node) -> Any:
    """softmax(q kᵀ·scale + mask) v, q (…, H, T, D), k (…, G, S, D), v (…, G, S, E) → (…, H, T, E).

    With grouped queries (G < H) the H/G queries of a group are stacked along T: keys and values
    are never repeated, and their gradients come out summed.
    """
    emit = importer.block_builder.emit
    query, key, value = (importer.env[a] for a in node.args[:3])
    q_shape, k_shape, v_shape = shape_of(query), shape_of(key), shape_of(value)
    scale = argument(node, 6, "scale") or node.kwargs.get("scale") or q_shape[-1] ** -0.5
    scores_shape = [*q_shape[:-1], k_shape[-2]]
    grouped = len(q_shape) > 3 and q_shape[-3] != k_shape[-3]
    if grouped:
        rows = q_shape[-3] // k_shape[-3] * q_shape[-2]
        query = emit(relax.op.reshape(query, [*k_shape[:-2], rows, q_shape[-1]]))
    rank = len(q_shape)
    transposed = emit(relax.op.permute_dims(key, [*range(rank - 2), rank - 1, rank - 2]))
    scores = emit(relax.op.matmul(query, transposed))
    scores = emit(relax.op.multiply(scores, const(scale, dtype_of(query))))
    if grouped:
        scores = emit(relax.op.reshape(scores, scores_shape))
    for mask in _masks(importer, node, scores_shape, dtype_of(query)):
        scores = emit(relax.op.add(scores, mask))
    weights = emit(relax.op.nn.softmax(scores, axis=-1))
    rate = float(argument(node, 4, "dropout_p", 0.0))
    weights = dropped(importer, weights, rate) if rate > 0 else weights
    if grouped:
        weights = emit(relax.op.reshape(weights, [*k_shape[:-2], rows, k_shape[-2]]))
    out = emit(relax.op.matmul(weights, value))
    if grouped:
        out = emit(relax.op.reshape(out, [*q_shape[:-1], v_shape[-1]]))
    return out


def _masks(importer: Any, node: fx.Node, scores_shape: list[int], dtype: str) -> list[Any]:
    emit, masks = importer.block_builder.emit, []
    given = argument(node, 3, "attn_mask")
    if given is not None:
        mask = importer.env[given]
        if dtype_of(mask) == "bool":
            mask = emit(relax.op.where(mask, const(0, dtype), const(MASKED, dtype)))
        masks.append(mask)
    if argument(node, 5, "is_causal", False):
        later = np.triu(np.ones(scores_shape[-2:], bool), 1)
        masks.append(relax.const(np.where(later, MASKED, 0).astype(dtype), dtype))
    return masks
