"""Transient bytes while each node of a sequence runs, before any kernel is compiled.

Counted as the memory plan counts: views share memory, an update lies over its parameter, results
live to the end, sizes are rounded up to the arena's alignment, and an output takes the place of a
dying operand where kernels commonly allow it (one that the epilogue reads at the index it writes).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pocktvm.ir.graph import Graph, Node, Value
from pocktvm.ir.kernels import aligned
from pocktvm.ir.ops import VIEWS, joins_loops

BOTH_GRADIENTS = "depthwise_grads"  # passes/join_gradients.py
# operators whose first operand may be overwritten by their first result
OVERWRITES = frozenset("softmax softmax_grad log_softmax_grad cross_entropy_grad".split())


class Lifetimes:
    """Who makes and who reads each transient value of a sequence of nodes.

    `first`, `last`: positions of its maker (-1 for inputs) and of its last reader;
    `touched`: every position that reads it, under any of its names.
    """

    def __init__(self, graph: Graph, nodes: Sequence[Node], values: Mapping[str, Value]) -> None:
        self.values, self.nodes = values, nodes
        self.root = roots(graph, nodes)
        kept = {*graph.params, *graph.consts, *graph.scalars}
        self.first: dict[str, int] = {n: -1 for n in graph.inputs}
        self.touched: dict[str, list[int]] = {n: [] for n in graph.inputs}
        for at, node in enumerate(nodes):
            for name in node.outputs:
                if self.root.get(name, name) == name and name not in kept:
                    self.first[name] = at
                    self.touched[name] = []
            for name in dict.fromkeys(self.root.get(n, n) for n in node.inputs):
                if name in self.touched:
                    self.touched[name].append(at)
        for name in graph.outputs.values():
            if (found := self.touched.get(self.root.get(name, name))) is not None:
                found.append(len(nodes))

    def size(self, name: str) -> int:
        """Bytes of a value, rounded up to the arena's alignment."""
        return aligned(self.values[name].nbytes)

    def last(self, name: str) -> int:
        """Position of the last reader; the maker's where there is none."""
        touched = self.touched[name]
        return touched[-1] if touched else max(self.first[name], 0)

    def live(self) -> np.ndarray:
        """Bytes alive at each node, in place where that is allowed."""
        change = np.zeros(len(self.nodes) + 2, np.int64)
        for name, start in self.first.items():
            size = self.size(name)
            change[max(start, 0)] += size
            change[self.last(name) + 1] -= size
        live = np.cumsum(change)[: len(self.nodes)]
        for at, node in enumerate(self.nodes):
            live[at] -= self._reused(at, node)
        return live

    def _reused(self, at: int, node: Node) -> int:
        """Bytes of outputs that take the place of an operand dying here."""
        total, taken = 0, set()
        for out, name in overwritable(node, self.values):
            old = self.root.get(name, name)
            free = old in self.first and self.first[old] < at and self.last(old) == at
            if free and out in self.first and old not in taken and out not in taken:
                taken |= {old, out}
                total += self.size(out)
        return total


def roots(graph: Graph, nodes: Sequence[Node]) -> dict[str, str]:
    """View -> the value whose memory it is; a parameter's new value -> the parameter."""
    root = {value: param for param, value in graph.updates.items()}
    for node in nodes:
        if node.op in VIEWS:
            root.setdefault(node.outputs[0], root.get(node.inputs[0], node.inputs[0]))
    return root


def overwritable(node: Node, values: Mapping[str, Value]) -> list[tuple[str, str]]:
    """(output, input) pairs that kernels let share memory."""
    if node.op in VIEWS:
        return []
    if node.op in OVERWRITES:
        return [(node.outputs[0], node.inputs[0])]
    blocked = {name for part in _loops(node) for name in part.inputs}
    pairs = []
    for out in node.outputs:
        for name in node.inputs:
            a, b = values[out], values[name]
            if a.shape == b.shape and a.dtype == b.dtype and name not in blocked:
                pairs.append((out, name))
    return pairs


def _loops(node: Node) -> tuple[Node, ...]:
    """The operators whose operands are read at other indices than the one that is written."""
    if node.attrs.get("kind") == BOTH_GRADIENTS and node.anchor is not None:
        return (node.anchor.anchor or node.anchor,)  # the others read x at dx's own pixel
    anchor = node.attrs.get("anchor") if node.body else (None if joins_loops(node.op) else 0)
    return () if anchor is None else node.kernel_nodes()[: anchor + 1]


def forward_nodes(graph: Graph) -> set[int]:
    """Nodes that outputs are computed from, with what save_masks put behind them; all others are
    the backward pass and the updates."""
    needed, found = set(graph.outputs.values()), set[int]()
    for index in range(len(graph.nodes) - 1, -1, -1):
        node = graph.nodes[index]
        if needed.intersection(node.outputs):
            needed.update(node.inputs)
            found.add(index)
    for index, node in enumerate(graph.nodes):
        if index - 1 in found and node.op in ("pack_mask", "strided_slice"):
            found.add(index)
    return found
