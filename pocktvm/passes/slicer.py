"""What the walks of sink_slices share: making cuts, reading them, and what a cut of a convolution's
weight gradient reads."""

from __future__ import annotations

import numpy as np

from pocktvm.ir.graph import Graph, Node
from pocktvm.passes.cuts import (
    Cut,
    Picked,
    Range,
    Selected,
    Shape,
    cut_attrs,
    cut_of,
    cut_shape,
    is_whole,
    kept,
    picked,
)
from pocktvm.passes.edit import Editor


class Slicer(Editor):
    """An editor that makes each slice once."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph)
        self.slices: dict[tuple[str, Cut], str] = {}

    def shape(self, name: str) -> Shape:
        """Shape of a value."""
        return tuple(self.values[name].shape)

    def sliced(self, name: str, cut: Cut, layer: str = "") -> str:
        """`name` behind a cut: itself where that is whole; cut once, whoever asks."""
        if is_whole(cut):
            return name
        maker = self.producer.get(name)
        placed = maker is not None and maker.op == "strided_slice_grad"
        if maker is not None and placed and cut_of(maker.attrs, self.shape(name)) == cut:
            return maker.inputs[0]
        key = (name, cut)
        if key not in self.slices:
            nodes = self.cut_nodes(name, cut, layer)
            for node in nodes:
                self.add(node)
            self.slices[key] = nodes[-1].outputs[0]
        return self.slices[key]

    def cut_nodes(self, name: str, cut: Cut, layer: str) -> list[Node]:
        """The nodes that cut `name`: one strided_slice, one take for each axis of indices."""
        made: list[Node] = []
        ranges = tuple(None if isinstance(c, Picked) else c for c in cut)
        if not is_whole(ranges):
            made.append(self._cut_node_of(name, ranges, layer, "strided_slice"))
        for axis, entry in enumerate(cut):
            if isinstance(entry, Picked):
                one = tuple(entry if i == axis else None for i in range(len(cut)))
                source = made[-1].outputs[0] if made else name
                made.append(self._cut_node_of(source, one, layer, "take", axis))
        return made

    def _cut_node_of(self, name: str, cut: Cut, layer: str, op: str, axis: int = 0) -> Node:
        shape = self.shape(name)
        out = self.declare(f"{name}~cut", cut_shape(cut, shape), self.values[name])
        if op == "strided_slice":
            return Node(op, (name,), (out,), cut_attrs(cut, shape), layer)
        entry = cut[axis]
        if isinstance(entry, Selected):
            indices = entry.source
        else:
            indices = self.const(np.asarray(entry, np.int32), "indices")
        return Node(op, (name, indices), (out,), {"axis": axis, "mode": "clip"}, layer)

    def cut(self, node: Node) -> Cut | None:
        """The cut `node` makes of its first operand; None for any other node."""
        shape = self.shape(node.inputs[0])
        if node.op == "strided_slice":
            return cut_of(node.attrs, shape)
        if node.op != "take":
            return None
        if (selection := self.params.get(node.inputs[1])) is not None:
            axis = int(node.attrs["axis"]) % len(shape)
            chosen = Selected(selection.value.tolist(), selection.name)
            return tuple(chosen if i == axis else None for i in range(len(shape)))
        indices = self.consts.get(node.inputs[1])
        if indices is None or indices.ndim != 1 or not (np.diff(indices) > 0).all():
            return None
        axis = int(node.attrs.get("axis") or 0) % len(shape)
        if not len(indices) or indices[0] < 0 or indices[-1] >= shape[axis]:
            return None
        entry = picked(indices.tolist(), shape[axis])
        return tuple(entry if i == axis else None for i in range(len(shape)))


def conv_operands(node: Node, cut: Cut, out: Shape, shapes: list[Shape]) -> list[Cut] | None:
    """The channels of x and dy that a cut [O, I/groups, kh, kw] of dw reads."""
    o, i, *window = cut
    if not is_whole(tuple(window)):
        return None
    groups = int(node.attrs.get("groups", 1))
    inside, x_channels = out[1], shapes[0][1]
    left = groups_left(node, cut, out)
    if left == 0:
        return None
    x: Range | Picked | None = i
    if groups > 1 and any(isinstance(entry, Selected) for entry in (o, i)):
        if out[:2] != (groups, 1):
            return None
        x = o  # depthwise: a group is a channel of either side
    elif left < groups and o is not None:  # whole groups of one input channel each
        size = out[0] // groups
        x = picked([c // size for c in kept(o, out[0])[::size]], groups)
    elif groups > 1 and i is not None:
        each = [g * inside + c for g in range(groups) for c in kept(i, inside)]
        x = picked(each, x_channels)
    return [(None, x, None, None), (None, o, None, None)]


def groups_left(node: Node, cut: Cut, out: Shape) -> int:
    """Groups of the weight gradient that computes only this cut; 0 where it is none."""
    groups = int(node.attrs.get("groups", 1))
    rows = cut[0]
    if groups == 1 or rows is None:
        return groups
    size = out[0] // groups
    counts = np.bincount([c // size for c in kept(rows, out[0])], minlength=groups)
    if len(set(counts.tolist())) == 1:
        return groups
    whole = set(counts.tolist()) <= {0, size} and out[1] == 1
    return int((counts > 0).sum()) if whole else 0
