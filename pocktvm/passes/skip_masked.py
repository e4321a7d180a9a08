"""Causal attention computes what its mask leaves: the lower triangle.

    s = add(multiply(matmul(q, kT), c), mask); p = softmax(s); o = matmul(p, v)
    →  s = multiply(matmul(q, kT, causal=result), c); p = softmax(s, causal)
       o = matmul(p, v, causal=a)

A constant mask that is minus infinity above the diagonal makes half of the scores zero before any
number is known. Of the scores, and of the gradient that the softmax takes back, the upper triangle
is then neither computed nor read (`causal="result"`: kernels may leave it unwritten); in products
with the probabilities or with the scores' gradient the sum ends at the diagonal (`causal="a"`: A is
zero above it). Softmax and its gradient look at a row up to the diagonal and write zeros behind it.
That is half the work of all six products of attention, forward and backward.

Declines where the mask also adds something below the diagonal, where anything else reads the
scores, and where queries and keys differ in number (a generated token, rows cut by sink_slices).
Runs after sink_slices and simplify, in front of fuse.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pocktvm.ir.graph import Graph, Node
from pocktvm.passes.edit import Editor

MASKED = -1e9  # and below: e**x is zero beside any score a float32 model computes


def skip_masked(graph: Graph) -> Graph:
    """Mark every product and softmax of causal attention; the mask itself goes away."""
    return _Marker(graph).run()


class _Marker:
    """`new`: nodes with their marks, by output; `zero`: values that are zero above the diagonal."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.makers, self.editor = graph, graph.producers(), Editor(graph)
        self.new: dict[str, Node] = {}
        self.zero: set[str] = set()

    def run(self) -> Graph:
        """Find what may skip the masked half, then rebuild the graph with it marked."""
        for node in self.graph.nodes:
            self._visit(node)
        for node in self.graph.nodes:
            self.editor.add(self.new.get(node.outputs[0], node))
        return self.editor.finish()

    def _visit(self, node: Node) -> None:
        if node.op == "softmax":
            scores = self._scores(node)
            if scores is not None:
                self._mark_result(scores)
                self._mark(replace(node, inputs=(scores,)), True)
                self.zero.add(node.outputs[0])
        elif node.op == "softmax_grad" and node.inputs[1] in self.zero:
            self._mark_result(node.inputs[0])
            self._mark(node, True)
            self.zero.add(node.outputs[0])
        elif node.op == "matmul" and node.inputs[0] in self.zero:
            self._mark(node, "a")
        elif node.inputs and node.inputs[0] in self.zero and self._scales(node):
            self.zero.add(node.outputs[0])

    def _mark(self, node: Node, how: str | bool) -> None:
        self.new[node.outputs[0]] = replace(node, attrs={**node.attrs, "causal": how})

    def _scores(self, softmax: Node) -> str | None:
        """What a causal mask is added to in front of a softmax over the last axis."""
        total, values = softmax.inputs[0], self.graph.values
        shape = values[total].shape
        add = self.makers.get(total)
        if add is None or add.op != "add" or softmax.attrs.get("axis") not in (-1, len(shape) - 1):
            return None
        if values[total].dtype != "float32" or len(shape) < 2 or shape[-1] != shape[-2]:
            return None
        for scores, mask in (add.inputs, add.inputs[::-1]):
            if mask in self.graph.consts and values[scores].shape == shape:
                return scores if _is_causal(self.graph.consts[mask], shape[-1]) else None
        return None

    def _mark_result(self, name: str) -> None:
        """The product behind `name`, when `name` is all that it is computed for."""
        while self._lone(name):
            maker = self.makers.get(name)
            if maker is not None and maker.op == "matmul":
                self._mark(maker, "result")
            if maker is None or not self._scales(maker):
                return
            name = maker.inputs[0]

    def _lone(self, name: str) -> bool:
        return self.editor.uses.get(name, 0) == 1

    def _scales(self, node: Node) -> bool:
        """True for an operator of one tensor that keeps zeros, and every element in its place."""
        if node.op in ("multiply", "divide"):
            return self.graph.values[node.inputs[1]].size == 1
        return node.op in ("dropout", "negative", "copy")


def _is_causal(mask: np.ndarray, extent: int) -> bool:
    """Nothing on and below the diagonal of the last two axes, minus infinity above."""
    if mask.ndim < 2 or mask.shape[-2:] != (extent, extent) or extent < 2:
        return False
    above = np.triu(np.ones((extent, extent), bool), 1)
    return bool((mask[..., above] <= MASKED).all() and (mask[..., ~above] == 0).all())
