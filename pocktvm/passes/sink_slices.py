"""Compute only the rows somebody reads.

    y = f(x);  z = strided_slice(y)          →  z = f(strided_slice(x))
    g = f'(strided_slice_grad(d), x)         →  g = strided_slice_grad(f'(d, strided_slice(x)))
    dw = matmul(strided_slice_grad(d)^T, x)  →  dw = matmul(d^T, strided_slice(x))
    dg = strided_slice(matmul(x^T, dy))      →  dg = matmul(strided_slice(x)^T, dy)
    dw = take(conv2d_weight_grad(x, dy))     →  dw = conv2d_weight_grad(take(x), dy)

A classifier that reads token 0 needs one row of the last encoder layer: of its feed-forward (two
thirds of a layer's work), of its attention's queries, and in the backward pass nothing else of
them. A gradient of which a share is asked computes that share and keeps that share of its operand:
where the scheme trains chosen channels, a `take` of constant indices is a cut like any other.

Two walks. Forward, the gradient of a slice (zeros around d) moves through whatever maps zero rows
to zero rows, until it meets a reader that sums over the rows (which then reads the slice alone) or
dense values. After that the backward pass reads slices of the forward values, and the second walk,
from the end, replaces a node all of whose readers make the same cut by the node of cut operands.
A cut that keeps more than half stays where it is, unless of a weight's gradient: it would cost
copies and end fused kernels.

Runs after the first simplify (transposes are flags) and before flatten_rows and assign_layout.
Source: what PockEngine (Zhu et al. 2023, section 3.2) does for channels, carried to every axis.
"""

from __future__ import annotations

import math
from dataclasses import replace

from pocktvm.ir.graph import Graph, Node, Value
from pocktvm.ir.ops import GRADIENTS, REDUCTIONS, is_elementwise
from pocktvm.passes.cuts import (
    Cut,
    Shape,
    broadcast_cut,
    cut_attrs,
    cut_of,
    cut_shape,
    is_whole,
    permuted_cut,
    reshaped_cut,
    unpermuted_cut,
)
from pocktvm.passes.edit import Editor
from pocktvm.passes.slicer import Slicer, conv_operands, groups_left

# zero rows of operand 0 (or of any operand: multiply) give zero rows of the result
KEEPS_ZERO = GRADIENTS | frozenset("multiply negative divide copy".split())
WEIGHT_GRADIENTS = frozenset({"conv2d_weight_grad", "matmul", "take_grad"})
ROW_GRADIENTS = frozenset("softmax_grad log_softmax_grad layer_norm_grad rms_norm_grad".split())


def sink_slices(graph: Graph) -> Graph:
    """Both walks; a graph without slices comes back as it is."""
    if not any(node.op.startswith(("strided_slice", "take")) for node in graph.nodes):
        return graph
    editor = GradientWalk(graph)
    for node in graph.nodes:
        editor.visit(editor.resolved(node))
    return SliceWalk(editor.finish()).run()


def pays(cut: Cut, shape: Shape) -> bool:
    """True when the cut keeps at most half of the elements."""
    return 2 * math.prod(cut_shape(cut, shape)) <= math.prod(shape)


class GradientWalk(Slicer):
    """Moves strided_slice_grad towards the end."""

    def visit(self, node: Node) -> None:
        """Append `node`, behind the zeros of its operands where it can be."""
        for position, name in enumerate(node.inputs):
            placed = self.producer.get(name)
            if placed is None or placed.op != "strided_slice_grad" or len(node.outputs) != 1:
                continue
            cut = cut_of(placed.attrs, self.shape(name))
            if pays(cut, self.shape(name)) and self.absorb(node, position, placed.inputs[0], cut):
                return
        self.add(node)

    def absorb(self, node: Node, position: int, d: str, cut: Cut) -> bool:
        """Rewrite `node`, whose operand `position` is d placed by `cut` into zeros."""
        out = self.shape(node.outputs[0])
        if node.op == "matmul":
            return self._matmul(node, position, d, cut)
        if node.op in REDUCTIONS:
            return node.op == "sum" and self._sum(node, d, cut)
        if node.op == "reshape":
            placed = reshaped_cut(cut, self.shape(node.inputs[0]), out)
            return placed is not None and self._place(node, [d], placed)
        if node.op == "permute_dims" and node.attrs.get("axes") is not None:
            return self._place(node, [d], permuted_cut(cut, node.attrs["axes"]))
        if self.shape(node.inputs[position]) != out:
            return False
        if node.op in ("add", "subtract"):
            return self._both(node, cut)
        linear = node.op in KEEPS_ZERO and (position == 0 or node.op == "multiply")
        rows = node.op in ROW_GRADIENTS and position == 0 and _keeps_rows(node, cut)
        if not (linear or rows):
            return False
        operands = self._operands(node, cut, rows)
        if operands is None:
            return False
        operands[position] = d
        return self._place(node, operands, cut)

    def _operands(self, node: Node, cut: Cut, rows: bool) -> list[str] | None:
        cuts = [operand_cut(self, node, i, cut, rows) for i in range(len(node.inputs))]
        if any(c is None for c in cuts):
            return None
        pairs = zip(node.inputs, cuts, strict=True)
        return [self.sliced(n, c, node.layer) for n, c in pairs if c is not None]

    def _both(self, node: Node, cut: Cut) -> bool:
        parts = []
        for name in node.inputs:
            placed = self.producer.get(name)
            if placed is None or placed.op != "strided_slice_grad":
                return False
            if cut_of(placed.attrs, self.shape(name)) != cut:
                return False
            parts.append(placed.inputs[0])
        return self._place(node, parts, cut)

    def _place(self, node: Node, operands: list[str], cut: Cut) -> bool:
        """out = zeros with node(operands) at `cut`."""
        name = node.outputs[0]
        value = self.values[name]
        small = replace(value, name=f"{name}~part", shape=cut_shape(cut, tuple(value.shape)))
        part = self.emit(node.op, operands, small, node.layer, **node.attrs)
        attrs = cut_attrs(cut, tuple(value.shape))
        self.add(Node("strided_slice_grad", (part,), (name,), attrs, node.layer))
        return True

    def _sum(self, node: Node, d: str, cut: Cut) -> bool:
        rank = len(cut)
        axes = node.attrs.get("axes")
        axes = tuple(range(rank)) if axes is None else tuple(axes)
        keep = bool(node.attrs.get("keepdims"))
        kept = tuple(None if i in axes else c for i, c in enumerate(cut) if keep or i not in axes)
        if not is_whole(kept):
            return self._place(node, [d], kept)
        self.add(replace(node, inputs=(d,)))
        return True

    def _matmul(self, node: Node, position: int, d: str, cut: Cut) -> bool:
        shapes = [self.shape(i) for i in node.inputs]
        if len({len(s) for s in shapes}) != 1 or len(shapes[0]) < 2:
            return False
        rank, other = len(shapes[0]), 1 - position
        inner, outer = _matrix_axes(node, position, rank)
        theirs, _ = _matrix_axes(node, other, rank)
        operand: list = [None] * rank
        for axis in range(rank - 2):
            if cut[axis] is not None and shapes[other][axis] != shapes[position][axis]:
                return False
            operand[axis] = cut[axis]
        operand[theirs] = cut[inner]
        inputs = [d, d]
        inputs[other] = self.sliced(node.inputs[other], tuple(operand), node.layer)
        placed: list = [*cut[: rank - 2], None, None]
        placed[rank - 2 + position] = cut[outer]
        if is_whole(tuple(placed)):
            self.add(replace(node, inputs=tuple(inputs)))
            return True
        return self._place(node, inputs, tuple(placed))


def _matrix_axes(node: Node, position: int, rank: int) -> tuple[int, int]:
    """(contracted axis, other axis) of an operand of a matmul."""
    flag = bool(node.attrs.get(("transpose_a", "transpose_b")[position]))
    contracted_last = flag == bool(position)
    return (rank - 1, rank - 2) if contracted_last else (rank - 2, rank - 1)


def _row_axes(node: Node, rank: int) -> set[int]:
    """Axes along which a row operator mixes elements."""
    axes = node.attrs.get("axes", (node.attrs.get("axis", rank - 1),))
    return {a % rank for a in axes}


def _keeps_rows(node: Node, cut: Cut) -> bool:
    return all(cut[a] is None for a in _row_axes(node, len(cut)))


def operand_cut(ed: Editor, node: Node, position: int, cut: Cut, rows: bool) -> Cut | None:
    """What an elementwise or row operator reads of operand `position` for this cut of its result;
    None when that is no cut."""
    shape = tuple(ed.values[node.inputs[position]].shape)
    if not rows or len(shape) == len(cut):
        return broadcast_cut(cut, shape)
    mixed = _row_axes(node, len(cut))
    lead = tuple(c for i, c in enumerate(cut) if i not in mixed)
    if len(shape) == len(lead) and node.op.startswith(("layer_norm_grad", "rms_norm_grad")):
        return lead if position >= 3 else (None,) * len(shape)
    return (None,) * len(shape) if len(shape) == len(mixed) else None


class SliceWalk(Slicer):
    """Moves strided_slice towards the beginning, from the last node to the first."""

    def run(self) -> Graph:
        """The rewritten graph."""
        graph = self.graph
        readers: dict[str, list[Node]] = {}
        results = graph.results()
        done: list[Node] = []  # in reverse
        gone: set[int] = set()
        for node in reversed(graph.nodes):
            made = self._cut_node(node, readers, results)
            for new in reversed(made or [node]):
                done.append(new)
                for name in dict.fromkeys(new.inputs):
                    readers.setdefault(name, []).append(new)
            if made is not None:
                gone.update(id(r) for o in node.outputs for r in readers.get(o, ()))
        kept = [n for n in reversed(done) if id(n) not in gone]
        for node in kept:
            self.visit_kept(node)
        return self.finish()

    def visit_kept(self, node: Node) -> None:
        """Append a node, one slice for equal cuts of a value."""
        node = self.resolved(node)
        cut = self.cut(node)
        if cut is not None:
            key = (node.inputs[0], cut)
            if key in self.slices:
                self.replace(node.outputs[0], self.slices[key])
                return
            self.slices[key] = node.outputs[0]
        self.add(node)

    def _cut_node(
        self, node: Node, readers: dict[str, list[Node]], results: set[str]
    ) -> list[Node] | None:
        """`node` of cut operands, with the slices in front of it, writing what the slices behind it
        wrote; None when its readers differ."""
        cuts: list[Cut | None] = []
        for name in node.outputs:
            mine = readers.get(name, [])
            found = {self.cut(r) if r.inputs[0] == name else None for r in mine}
            if name in results or None in found or len(found) > 1:
                return None
            cuts.append(found.pop() if found else None)
        if cuts[:1] in ([], [None]):
            return None
        operands = self._needed(node, cuts)
        if operands is None:
            return None
        return self._rebuild(node, cuts, operands, readers)

    def _needed(self, node: Node, cuts: list[Cut | None]) -> list[Cut] | None:
        """The cut of every operand, for these cuts of the results."""
        cut = cuts[0]
        assert cut is not None
        out = self.values[node.outputs[0]]
        channels = node.op in WEIGHT_GRADIENTS and out.role == "gradient"
        if not channels and not pays(cut, tuple(out.shape)):
            return None
        shapes = [self.shape(i) for i in node.inputs]
        if node.op in ("layer_norm", "rms_norm"):
            lead = tuple(c for i, c in enumerate(cut) if i not in _row_axes(node, len(cut)))
            ok = _keeps_rows(node, cut) and all(
                c is None or c[: len(lead)] == lead for c in cuts[1:]
            )
            return [cut, *((None,) * len(s) for s in shapes[1:])] if ok else None
        if len(node.outputs) != 1:
            return None
        if is_elementwise(node.op) or node.op == "broadcast_to":
            return [broadcast_cut(cut, s) for s in shapes]
        rowwise = node.op in ROW_GRADIENTS or node.op in ("softmax", "log_softmax")
        if rowwise and _keeps_rows(node, cut):
            found = [operand_cut(self, node, i, cut, True) for i in range(len(shapes))]
            return None if any(f is None for f in found) else [f for f in found if f is not None]
        return self._moved(node, cut, shapes)

    def _moved(self, node: Node, cut: Cut, shapes: list[Shape]) -> list[Cut] | None:
        if node.op == "reshape":
            back = reshaped_cut(cut, self.shape(node.outputs[0]), shapes[0])
            return None if back is None else [back]
        if node.op == "permute_dims" and node.attrs.get("axes") is not None:
            return [unpermuted_cut(cut, node.attrs["axes"])]
        if node.op == "matmul" and len({len(s) for s in shapes} | {len(cut)}) == 1:
            return _matmul_operands(node, cut, shapes)
        if node.op == "conv2d_weight_grad" and node.attrs.get("layout") == "NCHW":
            return conv_operands(node, cut, self.shape(node.outputs[0]), shapes)
        if node.op == "take_grad" and int(node.attrs.get("axis") or 0) == 0 and cut[0] is None:
            return [(*((None,) * len(shapes[1])), *cut[1:]), (None,) * len(shapes[1])]
        return None

    def _rebuild(
        self,
        node: Node,
        cuts: list[Cut | None],
        operands: list[Cut],
        readers: dict[str, list[Node]],
    ) -> list[Node]:
        made: list[Node] = []
        inputs: list[str] = []
        for name, part in zip(node.inputs, operands, strict=True):
            if is_whole(part):
                inputs.append(name)
                continue
            made += self.cut_nodes(name, part, node.layer)
            inputs.append(made[-1].outputs[0])
        outputs: list[str] = []
        lead = cuts[0]
        assert lead is not None
        for name, cut in zip(node.outputs, cuts, strict=True):
            value: Value = self.values[name]
            if cut is None:  # nobody reads it: rows like the first result's
                rows = lead[: len(value.shape)]
                shape = cut_shape(rows, self.shape(node.outputs[0])[: len(rows)])
                shape = tuple(1 if d == 1 else s for d, s in zip(value.shape, shape, strict=True))
                outputs.append(self.declare(f"{name}~part", shape, value))
                continue
            first, *rest = readers[name]
            outputs.append(first.outputs[0])
            for other in rest:
                self.replace(other.outputs[0], first.outputs[0])
        attrs = dict(node.attrs)
        if node.op == "conv2d_weight_grad":
            attrs["groups"] = groups_left(node, lead, self.shape(node.outputs[0]))
        made.append(replace(node, inputs=tuple(inputs), outputs=tuple(outputs), attrs=attrs))
        return made


def _matmul_operands(node: Node, cut: Cut, shapes: list[Shape]) -> list[Cut]:
    rank = len(cut)
    found: list[Cut] = []
    for position, shape in enumerate(shapes):
        mine: list = [None if shape[i] == 1 else cut[i] for i in range(rank - 2)] + [None, None]
        _, outer = _matrix_axes(node, position, rank)
        mine[outer] = cut[rank - 2 + position]
        found.append(tuple(mine))
    return found
