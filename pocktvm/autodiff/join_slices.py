"""The gradient of a tensor that was read in slices: one concat instead of padded sums.

    dx = slice_grad(da) + slice_grad(db) + slice_grad(dc)   →   dx = concat(da, db, dc)

Each slice_grad is a whole tensor of mostly zeros: for a fused q,k,v projection that is three times
the memory and five passes over it. Applies where unit-stride slices of one axis cover it exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from pocktvm.ir.graph import Node, Value


@dataclass(frozen=True)
class _Pieces:
    """A tensor that is zero outside disjoint ranges (begin, end, value) of one axis."""

    axis: int
    parts: tuple[tuple[int, int, str], ...]


def join_slices(nodes: Sequence[Node], values: Mapping[str, Value]) -> list[Node]:
    """Replace the additions that complete a cover; what they summed is left for DCE."""
    known: dict[str, _Pieces] = {}
    joined = []
    for node in nodes:
        out = node.outputs[0]
        pieces = _pieces(node, values, known)
        if pieces is not None:
            known[out] = pieces
            if node.op == "add" and _covers(pieces, values[out].shape[pieces.axis]):
                sources = tuple(name for _, _, name in pieces.parts)
                node = Node("concat", sources, node.outputs, {"axis": pieces.axis}, node.layer)
        joined.append(node)
    return joined


def _pieces(
    node: Node, values: Mapping[str, Value], known: Mapping[str, _Pieces]
) -> _Pieces | None:
    if node.op == "strided_slice_grad":
        return _single(node, values[node.outputs[0]].shape)
    if node.op != "add":
        return None
    a, b = (known.get(name) for name in node.inputs)
    if a is None or b is None or a.axis != b.axis:
        return None
    parts = tuple(sorted(a.parts + b.parts))
    disjoint = all(left[1] <= right[0] for left, right in pairwise(parts))
    return _Pieces(a.axis, parts) if disjoint else None


def _single(node: Node, shape: Sequence[int]) -> _Pieces | None:
    begin, end, strides = (node.attrs[key] for key in ("begin", "end", "strides"))
    cut = [i for i, (b, e, n) in enumerate(zip(begin, end, shape, strict=True)) if e - b != n]
    if len(cut) != 1 or any(s != 1 for s in strides):
        return None
    return _Pieces(cut[0], ((begin[cut[0]], end[cut[0]], node.inputs[0]),))


def _covers(pieces: _Pieces, size: int) -> bool:
    return sum(end - begin for begin, end, _ in pieces.parts) == size
