"""How a pass builds its result: nodes are appended in order, old names may stand for new ones."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from pocktvm.errors import InternalError
from pocktvm.ir.graph import Graph, Node, Value


class Editor:
    """A graph under construction from an old one.

    `alias` maps a value of the old graph to the value that replaces it; `uses` counts the readers
    (nodes and results) each value had in the old graph.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.values = dict(graph.values)
        self.consts = dict(graph.consts)
        self.params = dict(graph.params)
        self.nodes: list[Node] = []
        self.producer: dict[str, Node] = {}
        self.alias: dict[str, str] = {}
        self.uses: dict[str, int] = {}
        self._taken = set(graph.values)
        for node in graph.nodes:
            for name in node.inputs:
                self.uses[name] = self.uses.get(name, 0) + 1
        for name in (*graph.outputs.values(), *graph.updates.values()):
            self.uses[name] = self.uses.get(name, 0) + 1

    def resolve(self, name: str) -> str:
        """The value that stands for `name` now."""
        return self.alias.get(name, name)

    def resolved(self, node: Node) -> Node:
        """`node` reading what stands for its operands."""
        return node.with_inputs(self.alias) if self.alias else node

    def replace(self, old: str, new: str) -> None:
        """Let `new` stand for `old` from here on."""
        if old == new:
            return
        self.alias[old] = new
        self.uses[new] = self.uses.get(new, 0) + self.uses.get(old, 0)

    def add(self, node: Node) -> None:
        """Append a node as it is."""
        self.nodes.append(node)
        for name in node.outputs:
            if name in self.producer:
                raise InternalError(f"{self.graph.name}: '{name}' is computed twice: {node}")
            self.producer[name] = node

    def fresh(self, hint: str) -> str:
        """`hint`, or `hint.2` and so on where that is taken; taken from now on."""
        name, count = hint, 1
        while name in self._taken:
            count += 1
            name = f"{hint}.{count}"
        self._taken.add(name)
        return name

    def declare(self, hint: str, shape: Sequence[int], like: Value) -> str:
        """A new value of this shape with the dtype and role of `like`."""
        name = self.fresh(hint)
        self.values[name] = Value(name, tuple(shape), like.dtype, like.role)
        return name

    def emit(
        self,
        op: str,
        inputs: Sequence[str],
        out: Value,
        layer: str = "",
        **attrs: Any,
    ) -> str:
        """Append `out = op(inputs)`; a name that is defined already gets a number."""
        if out.name in self.producer or out.name not in self._taken:
            name = self.fresh(out.name)
        else:
            name = out.name
        self.values[name] = Value(name, tuple(out.shape), out.dtype, out.role)
        self.add(Node(op, tuple(inputs), (name,), attrs, layer))
        return name

    def const(self, array: np.ndarray, hint: str) -> str:
        """A constant named by its content, so that both programs of a build share it."""
        array = np.ascontiguousarray(array).reshape(array.shape)  # numpy gives rank 0 an axis
        digest = hashlib.sha1(array.tobytes(), usedforsecurity=False)
        digest.update(repr((array.shape, str(array.dtype))).encode())
        name = f"{hint.split('@')[0]}@{digest.hexdigest()[:10]}"
        if name not in self.consts:
            self.consts[name] = array
            self.values[name] = Value(name, tuple(array.shape), str(array.dtype))
            self._taken.add(name)
        return name

    def is_source(self, name: str) -> bool:
        """True for what no node computes."""
        return name not in self.producer

    def finish(self, **changes: Any) -> Graph:
        """The new graph, without what no result needs."""
        outputs = {k: self.resolve(v) for k, v in self.graph.outputs.items()}
        updates = {p: self.resolve(v) for p, v in self.graph.updates.items()}
        graph = self.graph.with_(
            **{
                "values": self.values,
                "nodes": tuple(self.nodes),
                "outputs": outputs,
                "updates": {p: v for p, v in updates.items() if p != v},
                "params": self.params,
                "consts": self.consts,
                **changes,
            }
        )
        return drop_dead(graph)


def drop_dead(graph: Graph) -> Graph:
    """Remove nodes, constants and types that no result needs; sources of the runtime stay."""
    live = graph.results()
    kept: list[Node] = []
    for node in reversed(graph.nodes):
        if any(out in live for out in node.outputs):
            kept.append(node)
            live.update(node.inputs)
    kept.reverse()
    named = {*graph.inputs, *graph.scalars, *graph.params} | live
    for node in kept:
        named |= node.names()
    return graph.with_(
        nodes=tuple(kept),
        values={k: v for k, v in graph.values.items() if k in named},
        consts={k: v for k, v in graph.consts.items() if k in live},
    )
