"""Both gradients of a depthwise convolution run as one kernel, with the sums beside them.

    z = relu6_grad(conv2d_input_grad(dy, w), x); dw = conv2d_weight_grad(x, dy)
    db = sum(dy); da = sum(z)
    →  dw, db, z, da = group[dw, db, z, da](dy, w, x): depthwise_grads

The two gradients do 2 kh kw operations a value they load, and load the same ones: dy for every tap,
x for the products and for the mask. One walk over the image reads each once
(schedule/rules/depthwise_grads.py), and the sums over pixels, the gradients of the shifts of the
batch norms on both sides, come with it. Each part keeps its own epilogue and its own update.

The sums may be there or not. Without the weight gradient nothing is joined: the input gradient and
sums of small maps are faster apart (W1a sparse: 0.39 instead of 0.53 ms of a step). A part that
another part needs by way of a third node stays apart.
The parts stay whole groups inside, in an order in which x dies with the input gradient, so that the
result may lie over it: where the rule declines, each is a kernel of its own again.

Runs after fuse, whose groups it joins, and before order, which finds the new kernel its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pocktvm.ir.graph import Graph, Node
from pocktvm.passes.liveness import BOTH_GRADIENTS
from pocktvm.passes.order import Dag

GEOMETRY = ("strides", "padding", "dilation", "groups", "layout")


def join_gradients(graph: Graph) -> Graph:
    """Join the gradients of every depthwise convolution."""
    for name in [n.outputs[0] for n in graph.nodes if _is_input_gradient(graph, n)]:
        graph = _joined(graph, name)
    return graph


def _joined(graph: Graph, name: str) -> Graph:
    """The graph with the parts around one input gradient joined, where that is legal."""
    dag = Dag(graph)
    at = next(i for i, node in enumerate(graph.nodes) if name in node.outputs)
    parts = _Parts.find(graph, at)
    if parts.weight is None:
        return graph
    chosen: list[int] = []
    for other in parts.others:
        together = [*chosen, other]
        if not parts.read_each_other(graph, together) and not _entangled(dag, [at, *together]):
            chosen.append(other)
    if parts.weight not in chosen:
        return graph
    # an update of the weight behind the gradient that reads the old one
    late = parts.weight in dag.after[at]
    members = parts.ordered(chosen, late)
    group = _group([graph.nodes[i] for i in members], members.index(at))
    nodes = tuple(group if i == at else n for i, n in enumerate(graph.nodes)
                  if i == at or i not in members)  # fmt: skip
    dag = Dag(graph.with_(nodes=nodes))
    return graph.with_(nodes=tuple(nodes[i] for i in dag.stable(lambda i: i)))


@dataclass(frozen=True)
class _Parts:
    """Indices of what may be joined to the input gradient `at`; None where there is none."""

    at: int
    weight: int | None
    dy_sum: int | None
    z_sum: int | None

    @classmethod
    def find(cls, graph: Graph, at: int) -> _Parts:
        """Look among the readers of dy and of the result."""
        gradient, users = graph.nodes[at], graph.users()
        anchor = _anchor(gradient)
        dy, dx = anchor.inputs[0], graph.values[anchor.outputs[0]]
        where = {id(node): i for i, node in enumerate(graph.nodes)}

        def first(found: Sequence[Node]) -> int | None:
            return where[id(found[0])] if found else None

        readers = users.get(dy, [])
        weights = [n for n in readers if _is_weight_gradient(graph, n, anchor, dx.shape)]
        sums = [n for n in readers if _sums(n, dy)]
        of_result = [n for o in gradient.outputs for n in users.get(o, []) if _sums(n, o)]
        return cls(at, first(weights), first(sums), first(of_result))

    @property
    def others(self) -> list[int]:
        """All but the input gradient, the dearest first."""
        return [i for i in (self.weight, self.z_sum, self.dy_sum) if i is not None]

    def ordered(self, chosen: Sequence[int], late: bool) -> list[int]:
        """The input gradient and the chosen ones in an order in which they can run one by one."""
        first = (self.dy_sum, self.at, self.weight) if late else (self.weight, self.dy_sum, self.at)
        return [i for i in (*first, self.z_sum)
                if i is not None and (i == self.at or i in chosen)]  # fmt: skip

    def read_each_other(self, graph: Graph, chosen: Sequence[int]) -> bool:
        """Does one of them read another's result, but for the sum of the input gradient's?"""
        members = {i: graph.nodes[i] for i in (self.at, *chosen)}
        return any(
            set(reader.inputs) & set(maker.outputs)
            for i, maker in members.items()
            for j, reader in members.items()
            if i != j and (i, j) != (self.at, self.z_sum)
        )


def _anchor(node: Node) -> Node:
    """The operator in front of its epilogue."""
    return node.body[0] if node.body else node


def _plain(node: Node, op: str) -> bool:
    """Is this `op`, alone or in front of an epilogue?"""
    return _anchor(node).op == op and node.attrs.get("anchor", 0) == 0 and not _anchor(node).body


def _is_input_gradient(graph: Graph, node: Node) -> bool:
    if not _plain(node, "conv2d_input_grad"):
        return False
    anchor = _anchor(node)
    channels = graph.values[anchor.outputs[0]].shape[-1]
    depthwise = graph.values[anchor.inputs[0]].shape[-1] == channels
    depthwise = depthwise and anchor.attrs.get("groups", 1) == channels > 1
    return depthwise and anchor.attrs.get("layout") == "NHWC"


def _is_weight_gradient(graph: Graph, node: Node, anchor: Node, shape: Sequence[int]) -> bool:
    """The weight gradient of the same convolution."""
    if not _plain(node, "conv2d_weight_grad"):
        return False
    other = _anchor(node)
    alike = all(repr(other.attrs.get(k)) == repr(anchor.attrs.get(k)) for k in GEOMETRY)
    x, dy = other.inputs
    return alike and dy == anchor.inputs[0] and graph.values[x].shape == tuple(shape)


def _sums(node: Node, name: str) -> bool:
    """Is this the sum of a value over images, rows and columns?"""
    axes = (0, 1, 2)
    return _plain(node, "sum") and _anchor(node).inputs[0] == name and \
        tuple(_anchor(node).attrs.get("axes") or ()) == axes  # fmt: skip


def _entangled(dag: Dag, members: Sequence[int]) -> bool:
    """Does a path lead out of the members and back into them?"""
    inside = set(members)
    seen: set[int] = set()
    todo = [reader for i in members for reader in dag.after[i] if reader not in inside]
    while todo:
        i = todo.pop()
        if i in seen:
            continue
        seen.add(i)
        if dag.after[i] & inside:
            return True
        todo += dag.after[i]
    return False


def _group(parts: Sequence[Node], at: int) -> Node:
    made = [name for part in parts for name in part.outputs]
    read = dict.fromkeys(n for part in parts for n in part.inputs if n not in made)
    attrs = {"anchor": at, "kind": BOTH_GRADIENTS}
    return Node("group", tuple(read), tuple(made), attrs, parts[at].layer, tuple(parts))
