"""Remove what costs a kernel and computes nothing.

    y = reshape(reshape(x)); z = multiply(broadcast_to(s), permute_dims(permute_dims(y)))
    →  y = reshape(x); z = multiply(s, y)

Importers and gradients leave views of views, expanded scalars, explicit transposes in front of
matrix products, and the same expression twice (the forward's and the gradient's). Every one of them
is a pass over memory at run time. Each node is rebuilt in order through the rules of its operator,
so a rewrite sees simplified operands; equal expressions become one value on the way (common
subexpressions), and what nobody reads is dropped at the end. Needs nothing before it, runs after
every pass that leaves views behind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pocktvm.ir.graph import Graph, Node, Value
from pocktvm.ir.ops import is_elementwise
from pocktvm.passes.edit import Editor

Rule = Callable[["Simplifier", Node], str | None]
RULES: dict[str, list[Rule]] = {}
ELEMENTWISE_RULES: list[Rule] = []

SMALL = 4096  # elements; constants up to this size are compared by content


def simplify(graph: Graph) -> Graph:
    """Apply the rules until nothing changes (at most eight times; two are usual)."""
    for _ in range(8):
        before = len(graph.nodes)
        editor = Simplifier(graph)
        for node in graph.nodes:
            editor.visit(editor.resolved(node))
        graph = editor.finish()
        if not editor.changed and len(graph.nodes) == before:
            break
    return graph


def rule(*ops: str) -> Callable[[Rule], Rule]:
    """Register a rewrite for these operators: (editor, node) -> the equal value, or None."""

    def register(function: Rule) -> Rule:
        for op in ops:
            RULES.setdefault(op, []).append(function)
        return function

    return register


def elementwise_rule(function: Rule) -> Rule:
    """Register a rewrite tried on every elementwise operator."""
    ELEMENTWISE_RULES.append(function)
    return function


class Simplifier(Editor):
    """An editor whose nodes pass through the rules, with one value per expression."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph)
        self.changed = False
        self.seen: dict[Any, tuple[str, ...]] = {}
        self.results = graph.results()
        self._merge_small_constants()

    def _merge_small_constants(self) -> None:
        first: dict[Any, str] = {}
        for name, array in self.consts.items():
            if array.size <= SMALL:
                key = (array.shape, str(array.dtype), array.tobytes())
                self.replace(name, first.setdefault(key, name))

    def visit(self, node: Node) -> None:
        """Append `node`, or let an equal value stand for its output."""
        if len(node.outputs) == 1 and not node.body:
            name = node.outputs[0]
            found = self._rewrite(node)
            if found is not None and not (name in self.results and self.is_source(found)):
                self.changed = True
                self.replace(name, found)
                return
        key = self._key(node)
        earlier = self.seen.get(key)
        if earlier is not None:
            self.changed = True
            for name, same in zip(node.outputs, earlier, strict=True):
                self.replace(name, same)
            return
        self.seen[key] = node.outputs
        self.add(node)

    def _rewrite(self, node: Node) -> str | None:
        for function in RULES.get(node.op, ()):
            if (found := function(self, node)) is not None:
                return found
        if is_elementwise(node.op):
            for function in ELEMENTWISE_RULES:
                if (found := function(self, node)) is not None:
                    return found
        return None

    def make(
        self, op: str, inputs: Sequence[str], out: Value, layer: str = "", **attrs: Any
    ) -> str:
        """`op(inputs)` through the rules; returns the value that holds it."""
        name = self.declare(out.name.split("~")[0] + "~", out.shape, out)
        for operand in inputs:  # the replaced node may still be read by others
            self.uses[operand] = self.uses.get(operand, 0) + 1
        self.visit(Node(op, tuple(inputs), (name,), attrs, layer))
        return self.resolve(name)

    def _key(self, node: Node) -> Any:
        types = tuple((self.values[o].shape, self.values[o].dtype) for o in node.outputs)
        attrs = tuple(sorted((k, repr(v)) for k, v in node.attrs.items()))
        return node.op, node.inputs, attrs, types, repr(node.body) if node.body else ""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a value."""
        return tuple(self.values[name].shape)

    def made_by(self, name: str, *ops: str) -> Node | None:
        """The node that computes `name`, when it is one of `ops`."""
        node = self.producer.get(name)
        return node if node is not None and node.op in ops else None

    def only_use(self, name: str) -> bool:
        """True when one reader at most waits for this value, so that its node may go."""
        return self.uses.get(name, 0) <= 1

    def small_const(self, name: str) -> np.ndarray | None:
        """A constant's array when it is cheap to compute with."""
        array = self.consts.get(name)
        return array if array is not None and array.size <= SMALL else None

    def is_all(self, name: str, number: float) -> bool:
        """True for a small constant that holds nothing but `number`."""
        array = self.small_const(name)
        return array is not None and bool(np.all(array == number))


from pocktvm.passes import (  # noqa: E402, F401  (rules)
    simplify_arithmetic,
    simplify_loss,
    simplify_views,
)
