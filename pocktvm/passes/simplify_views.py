"""Rules of simplify for operators that only move elements."""

from __future__ import annotations

import math

import numpy as np

from pocktvm.ir.graph import Node
from pocktvm.passes.simplify import Simplifier, elementwise_rule, rule


@rule("reshape")
def merge_reshape(ed: Simplifier, node: Node) -> str | None:
    """reshape to the same shape is x; a chain keeps its last; a reduction drops its ones."""
    (x,), out = node.inputs, ed.values[node.outputs[0]]
    if ed.shape(x) == tuple(out.shape):
        return x
    if inner := ed.made_by(x, "reshape"):
        return ed.make("reshape", inner.inputs, out, node.layer)
    reduction = ed.made_by(x, "sum", "mean", "max", "min", "prod")
    if reduction and reduction.attrs.get("keepdims") and ed.only_use(x):
        rank = len(ed.shape(reduction.inputs[0]))
        axes = reduction.attrs.get("axes") or tuple(range(rank))
        kept = tuple(d for i, d in enumerate(ed.shape(x)) if i not in axes)
        if kept == tuple(out.shape):
            attrs = {**reduction.attrs, "keepdims": False}
            return ed.make(reduction.op, reduction.inputs, out, node.layer, **attrs)
    return None


@rule("permute_dims")
def merge_permute(ed: Simplifier, node: Node) -> str | None:
    """identity is x; a chain is one; moving axes of length one is a view."""
    (x,), out = node.inputs, ed.values[node.outputs[0]]
    axes = permutation(ed, node)
    if axes == tuple(range(len(axes))):
        return x
    if inner := ed.made_by(x, "permute_dims"):
        composed = tuple(permutation(ed, inner)[a] for a in axes)
        return ed.make("permute_dims", inner.inputs, out, node.layer, axes=composed)
    moved = [a for a in axes if ed.shape(x)[a] != 1]
    if moved == sorted(moved):
        return ed.make("reshape", (x,), out, node.layer)
    return None


def permutation(ed: Simplifier, node: Node) -> tuple[int, ...]:
    """A permute's axes, explicit and non-negative."""
    rank = len(ed.shape(node.inputs[0]))
    axes = node.attrs.get("axes")
    return tuple(reversed(range(rank))) if axes is None else tuple(a % rank for a in axes)


@rule("permute_dims")
def permute_of_view(ed: Simplifier, node: Node) -> str | None:
    """permute(reshape(permute(x))) is a view of x where the two permutations cancel.

    Both are written over a common refinement of the axes: the dimensions that remain when every
    boundary of either shape is a boundary.
    """
    view = ed.made_by(node.inputs[0], "reshape")
    first = ed.made_by(view.inputs[0], "permute_dims") if view else None
    if view is None or first is None:
        return None
    before, after = ed.shape(view.inputs[0]), ed.shape(view.outputs[0])
    pieces = refinement(before, after)
    if pieces is None:
        return None
    dims, old, new = pieces
    # positions of the pieces in x's own order, then where the second permutation takes them
    source = permutation(ed, first)
    order_of_x = [p for axis in np.argsort(source) for p in old[axis]]
    result = [p for axis in permutation(ed, node) for p in new[axis]]
    position = {p: i for i, p in enumerate(order_of_x)}
    moved = [position[p] for p in result if dims[p] != 1]
    if moved == sorted(moved):
        return ed.make("reshape", first.inputs, ed.values[node.outputs[0]], node.layer)
    return None


def refinement(
    before: tuple[int, ...], after: tuple[int, ...]
) -> tuple[list[int], list[list[int]], list[list[int]]] | None:
    """Dimensions of which both shapes' axes are products, and the pieces of each axis."""
    if math.prod(before) == 0:
        return None
    bounds = {math.prod(s[: i + 1]) for s in (before, after) for i in range(len(s))}
    steps = sorted(bounds - {1})
    dims = [b // a for a, b in zip([1, *steps], steps, strict=False)]
    if any(b % a for a, b in zip([1, *steps], steps, strict=False)):
        return None

    def pieces(shape: tuple[int, ...]) -> list[list[int]]:
        cursor, result = 0, []
        for length in shape:
            mine, product = [], 1
            while product < length:
                product *= dims[cursor]
                mine.append(cursor)
                cursor += 1
            result.append(mine)
        return result

    return dims, pieces(before), pieces(after)


@rule("permute_dims")
def permute_of_matmul(ed: Simplifier, node: Node) -> str | None:
    """(a b)^T = b^T a^T: a weight gradient comes out in torch's orientation."""
    product = ed.made_by(node.inputs[0], "matmul")
    axes = permutation(ed, node)
    swap = (*range(len(axes) - 2), len(axes) - 1, len(axes) - 2)
    if product is None or axes != swap or not ed.only_use(node.inputs[0]):
        return None
    a, b = product.inputs
    if len(ed.shape(a)) != len(axes) or len(ed.shape(b)) != len(axes):
        return None
    return ed.make(
        "matmul",
        (b, a),
        ed.values[node.outputs[0]],
        node.layer or product.layer,
        transpose_a=not product.attrs.get("transpose_b", False),
        transpose_b=not product.attrs.get("transpose_a", False),
    )


@rule("matmul")
def matmul_of_permute(ed: Simplifier, node: Node) -> str | None:
    """A transposed operand becomes a flag."""
    inputs, attrs, found = list(node.inputs), dict(node.attrs), False
    for side, flag in enumerate(("transpose_a", "transpose_b")):
        permute = ed.made_by(inputs[side], "permute_dims")
        rank = len(ed.shape(inputs[side]))
        swap = (*range(rank - 2), rank - 1, rank - 2)
        if permute is not None and rank >= 2 and permutation(ed, permute) == swap:
            inputs[side], attrs[flag], found = permute.inputs[0], not attrs.get(flag, False), True
    if not found:
        return None
    return ed.make("matmul", inputs, ed.values[node.outputs[0]], node.layer, **attrs)


@rule("broadcast_to")
def merge_broadcast(ed: Simplifier, node: Node) -> str | None:
    """broadcast to the same shape is x; a chain keeps its last."""
    (x,), out = node.inputs, ed.values[node.outputs[0]]
    if ed.shape(x) == tuple(out.shape):
        return x
    if inner := ed.made_by(x, "broadcast_to"):
        return ed.make("broadcast_to", inner.inputs, out, node.layer)
    return None


@elementwise_rule
def broadcast_after(ed: Simplifier, node: Node) -> str | None:
    """f(broadcast_to(s), y) = f(s, y), and f(broadcast_to(s)) = broadcast_to(f(s))."""
    inputs = tuple(
        inner.inputs[0] if (inner := ed.made_by(i, "broadcast_to")) else i for i in node.inputs
    )
    if inputs == node.inputs:
        return None
    out = ed.values[node.outputs[0]]
    shape = np.broadcast_shapes(*(ed.shape(i) for i in inputs))
    small = type(out)(out.name, shape, out.dtype, out.role)
    name = ed.make(node.op, inputs, small, node.layer, **node.attrs)
    return name if shape == tuple(out.shape) else ed.make("broadcast_to", (name,), out, node.layer)


@rule("copy")
def drop_copy(ed: Simplifier, node: Node) -> str | None:
    """A functional program needs no copies."""
    return node.inputs[0]


@rule("astype")
def drop_astype(ed: Simplifier, node: Node) -> str | None:
    """A cast to the same type is x."""
    return node.inputs[0] if _same_type(ed, node) else None


def _same_type(ed: Simplifier, node: Node) -> bool:
    x, out = ed.values[node.inputs[0]], ed.values[node.outputs[0]]
    return (x.dtype, tuple(x.shape)) == (out.dtype, tuple(out.shape))


@rule("strided_slice", "strided_slice_grad")
def drop_whole_slice(ed: Simplifier, node: Node) -> str | None:
    """A slice of everything is x."""
    strides = node.attrs.get("strides") or (1,)
    return node.inputs[0] if _same_type(ed, node) and all(s == 1 for s in strides) else None


@rule("pad")
def drop_empty_pad(ed: Simplifier, node: Node) -> str | None:
    """Padding by nothing is x."""
    return node.inputs[0] if not any(node.attrs["pad_width"]) else None


@rule("concat")
def drop_single_concat(ed: Simplifier, node: Node) -> str | None:
    """A concatenation of one is x."""
    return node.inputs[0] if len(node.inputs) == 1 else None


@rule("sum", "mean", "max", "min", "prod")
def drop_unit_reduction(ed: Simplifier, node: Node) -> str | None:
    """A reduction over axes of length one is a view; over no axes, x."""
    x, axes = ed.shape(node.inputs[0]), node.attrs.get("axes")
    axes = tuple(range(len(x))) if axes is None else axes
    if all(x[a] == 1 for a in axes):
        return ed.make("reshape", node.inputs, ed.values[node.outputs[0]], node.layer)
    return None


@rule("avg_pool2d")
def global_pool_is_mean(ed: Simplifier, node: Node) -> str | None:
    """A window over the whole image is a mean, which takes an epilogue like any reduction."""
    axes = _whole_window(node, ed.shape(node.inputs[0]))
    if axes is None:
        return None
    out = ed.values[node.outputs[0]]
    return ed.make("mean", node.inputs, out, node.layer, axes=axes, keepdims=True)


@rule("avg_pool2d_grad")
def global_pool_gradient(ed: Simplifier, node: Node) -> str | None:
    """Its gradient is dy / (h * w) at every pixel: a broadcast, which fusion swallows."""
    out = ed.values[node.outputs[0]]
    axes = _whole_window(node, out.shape)
    if axes is None:
        return None
    pixels = math.prod(out.shape[a] for a in axes)
    dy = ed.values[node.inputs[0]]
    share = ed.const(np.array(1.0 / pixels, np.float32), "scalar")
    scaled = ed.make("multiply", (node.inputs[0], share), dy, node.layer)
    return ed.make("broadcast_to", (scaled,), out, node.layer)


def _whole_window(node: Node, x: tuple[int, ...]) -> tuple[int, int] | None:
    axes = (1, 2) if node.attrs.get("layout") == "NHWC" else (2, 3)
    whole = tuple(node.attrs["pool"]) == tuple(x[a] for a in axes)
    plain = not any(node.attrs.get("padding", (0,)))
    return axes if whole and plain else None
