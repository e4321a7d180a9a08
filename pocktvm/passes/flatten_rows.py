"""Tokens become rows: [batch, token, feature] operators work on [batch * token, feature].

    y = reshape(matmul(x2, w), [B, S, D]); z = add(y, bias); u = gelu(z)
    →  z2 = add(matmul(x2, w), bias); u2 = gelu(z2)          2-D throughout, no view in between

A product of tokens with a matrix is two-dimensional, what follows it in a model is not, and the
view between them would end a fused kernel: bias, activation, residual and their gradients would be
passes over memory of their own (a third of an encoder's traffic). Elementwise operators, norms,
softmax and sums over tokens do not care, so they are rewritten to rows wherever their component
(3-D values linked by such operators) touches a view to or from two dimensions. A component that
touches a batched product keeps its three axes. Where another reader needs three, a view gives them.

Runs after simplify, before fuse; a simplify behind it merges the views.
"""

from __future__ import annotations

import math
from dataclasses import replace

from pocktvm.ir.graph import Graph, Node, Value
from pocktvm.ir.ops import REDUCTIONS, joins_loops
from pocktvm.passes.components import Components
from pocktvm.passes.edit import Editor

ROWWISE = frozenset(
    "softmax log_softmax softmax_grad log_softmax_grad layer_norm layer_norm_grad rms_norm "
    "rms_norm_grad broadcast_to".split()
)
Shape = tuple[int, ...]


def flatten_rows(graph: Graph) -> Graph:
    """Rewrite the components that meet two-dimensional products."""
    editor = RowEditor(graph, find_rows(graph))
    for node in graph.nodes:
        editor.rewrite(node)
    return editor.finish()


def row_view(small: Shape, full: Shape) -> Shape | None:
    """The 2-D shape of an operand of a 3-D operator; None where rows would need copies."""
    padded = (1,) * (3 - len(small)) + tuple(small)
    a, b, last = padded
    if len(small) > 3 or (last not in (1, full[2])):
        return None
    if (a, b) == (1, 1):
        return (1, last)
    return (a * b, last) if (a, b) == tuple(full[:2]) else None


def flattens(graph: Graph, node: Node) -> bool:
    """True for an operator that works on rows: 3-D, every operand a row, a column or a vector."""
    values = graph.values
    full = widest(graph, node)
    if full is None:
        return False
    statistics = {"layer_norm_grad": node.inputs[3:], "rms_norm_grad": node.inputs[3:]}
    plain = [i for i in node.inputs if i not in statistics.get(node.op, ())]
    if any(row_view(values[i].shape, full) is None for i in plain):
        return False
    if joins_loops(node.op) or node.op == "broadcast_to":
        return values[node.outputs[0]].shape == full
    if node.op in REDUCTIONS:
        axes = node.attrs.get("axes")
        return axes is None or tuple(axes) in ((0, 1), (2,), (0, 1, 2))
    if node.op in ROWWISE:
        axes = node.attrs.get("axes", (node.attrs.get("axis"),))
        return tuple(a % 3 for a in axes) == (2,)
    return False


def widest(graph: Graph, node: Node) -> Shape | None:
    """The 3-D shape whose first two axes are the rows."""
    name = node.inputs[0] if node.op in REDUCTIONS else node.outputs[0]
    shape = tuple(graph.values[name].shape)
    return shape if len(shape) == 3 and not node.body else None


def find_rows(graph: Graph) -> set[str]:
    """3-D values of the components to rewrite."""
    links = Components()
    rows: set[str] = set()
    batched: set[str] = set()
    for node in graph.nodes:
        names = [n for n in (*node.inputs, *node.outputs) if len(graph.values[n].shape) == 3]
        if node.op == "matmul":
            batched.update(names)
        elif node.op == "reshape":
            rows.update(names if _meets_rows(graph, node) else ())
        elif flattens(graph, node):
            full = widest(graph, node)
            links.join([n for n in names if tuple(graph.values[n].shape) == full])
    wanted = {links.find(n) for n in rows} - {links.find(n) for n in batched}
    return {n for n in links if links.find(n) in wanted}


def _meets_rows(graph: Graph, node: Node) -> bool:
    x, y = (tuple(graph.values[n].shape) for n in (node.inputs[0], node.outputs[0]))
    return {len(x), len(y)} == {2, 3} and x[-1] == y[-1]


class RowEditor(Editor):
    """An editor that keeps, for rewritten values, the name of their rows."""

    def __init__(self, graph: Graph, rows: set[str]) -> None:
        super().__init__(graph)
        self.rows = rows
        self.views: dict[tuple[str, Shape], str] = {}

    def view(self, name: str, shape: Shape, layer: str = "") -> str:
        """`name` in another shape, one view for each."""
        value = self.values[name]
        if tuple(value.shape) == shape:
            return name
        if name in self.consts:
            return self.const(self.consts[name].reshape(shape), name)
        key = (name, shape)
        if key not in self.views:
            out = replace(value, name=f"{name}~rows", shape=shape)
            self.views[key] = self.emit("reshape", (name,), out, layer)
        return self.views[key]

    def rewrite(self, node: Node) -> None:
        """Append `node`, on rows when its component is."""
        full = widest(self.graph, node)
        key = node.inputs[0] if node.op in REDUCTIONS else node.outputs[0]
        node = self.resolved(node)
        if full is None or key not in self.rows or not flattens(self.graph_now(), node):
            self.add(node)
            return
        inputs = [self._operand(i, full, node) for i in node.inputs]
        attrs, shapes = self._attributes(node, full)
        outs: list[str] = []
        for name, shape in zip(node.outputs, shapes, strict=True):
            flat = self.fresh(f"{name}~rows")
            self.values[flat] = replace(self.values[name], name=flat, shape=shape)
            outs.append(flat)
        self.add(Node(node.op, tuple(inputs), tuple(outs), attrs, node.layer))
        for name, flat in zip(node.outputs, outs, strict=True):
            old: Value = self.graph.values[name]
            self.add(Node("reshape", (flat,), (name,), {}, node.layer))
            self.values[name] = old
            self.views[(name, tuple(self.values[flat].shape))] = flat

    def graph_now(self) -> Graph:
        """The old graph with today's types, for `flattens`."""
        return replace(self.graph, values=self.values)

    def _operand(self, name: str, full: Shape, node: Node) -> str:
        shape = tuple(self.values[name].shape)
        rows = row_view(shape, full)
        if rows is None or len(shape) == 0:
            return name
        vector = len(shape) == 1 and node.op not in ROWWISE
        if len(shape) == 1 and not vector:
            return name  # a norm's gain and shift stay vectors
        if node.op in ROWWISE and "norm" in node.op and math.prod(shape) == full[0] * full[1]:
            return self.view(name, (full[0] * full[1], 1), node.layer)
        return name if vector else self.view(name, rows, node.layer)

    def _attributes(self, node: Node, full: Shape) -> tuple[dict[str, object], list[Shape]]:
        """Attributes on rows, and the shapes of the results."""
        attrs = dict(node.attrs)
        count = full[0] * full[1]
        if node.op in REDUCTIONS:
            axes = node.attrs.get("axes")
            axes = (0, 1, 2) if axes is None else tuple(axes)
            attrs["axes"] = {(0, 1): (0,), (2,): (1,), (0, 1, 2): (0, 1)}[axes]
            kept = [d for i, d in enumerate((count, full[2])) if i not in attrs["axes"]]
            if node.attrs.get("keepdims"):
                kept = [1 if i in attrs["axes"] else d for i, d in enumerate((count, full[2]))]
            return attrs, [tuple(kept)]
        if "axes" in attrs:
            attrs["axes"] = (1,)
        if "axis" in attrs:
            attrs["axis"] = 1
        statistics = [(count, 1)] * (len(node.outputs) - 1)
        return attrs, [(count, full[2]), *statistics]
