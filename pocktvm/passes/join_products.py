"""Products of one input run as one kernel: queries, keys and values; their weights' gradients.

    q = matmul(x, Wq) + bq; k = matmul(x, Wk) + bk; v = matmul(x, Wv) + bv
    →  q, k, v = group[q, k, v](x, Wq, bq, Wk, bk, Wv, bv): products

Every parallel kernel wakes the other cores and waits for the last one; three products of a small
model are three such rounds, or too short for any. Joined, their tiles are dealt out together
(schedule/rules/products.py). The weights stay where they are, learned or frozen, each with its own
epilogue, update and layout; nothing is concatenated or split, and every sum keeps its order.

The joined kernel runs where the first of its parts did, or else where the last did. Declines where
neither is legal (a part reads what another computes, a reader stands between, an update would pass
a reader of the old value), and where the peak of live bytes would grow. The parts stay whole groups
inside: the rule declines on one core and for products that fill all cores by themselves, and each
is a kernel of its own again.

Left out, for they gain nothing that could be measured (docs/passes.md): one product with
concatenated weights, gate and up in one epilogue, input gradients as one sum.

Runs after order, whose peak is the one that must not grow.
"""

from __future__ import annotations

from collections.abc import Sequence

from pocktvm.ir.graph import Graph, Node
from pocktvm.passes.liveness import Lifetimes

KIND = "products"
MOST = 4  # parts; more outputs live at once than a model's head count of matrices needs


def join_products(graph: Graph) -> Graph:
    """Join every set of products of one input that may run together."""
    nodes = list(graph.nodes)
    peak = _peak(graph, nodes)
    for names in _candidates(graph):
        for subset in (names, names[:2]):
            joined = _joined(graph, nodes, subset)
            if joined is not None and _peak(graph, joined) <= peak:
                nodes = joined
                break
    return graph.with_(nodes=tuple(nodes)) if len(nodes) < len(graph.nodes) else graph


def _peak(graph: Graph, nodes: Sequence[Node]) -> int:
    return int(Lifetimes(graph, nodes, graph.values).live().max(initial=0))


def _candidates(graph: Graph) -> list[list[str]]:
    """First outputs of products that read the same matrix, in order."""
    found: dict[tuple[object, ...], list[str]] = {}
    for node in graph.nodes:
        product = node.anchor
        if product is None or product.op != "matmul" or node.attrs.get("anchor", 0) != 0:
            continue
        shapes = [graph.values[n].shape for n in product.inputs]
        if len(shapes[1]) != 2 or any(graph.values[n].dtype != "float32" for n in node.inputs):
            continue
        turned = bool(product.attrs.get("transpose_a")), bool(product.attrs.get("transpose_b"))
        # a weight's gradient is dy^T x: what it shares is the second operand
        shared = product.inputs[1] if turned[0] else product.inputs[0]
        if shared not in graph.consts and shared not in graph.params:
            found.setdefault((shared, turned), []).append(node.outputs[0])
    return [names[:MOST] for names in found.values() if len(names) > 1]


def _joined(graph: Graph, nodes: list[Node], names: Sequence[str]) -> list[Node] | None:
    """The sequence with one node for the products of these outputs; None where none is legal."""
    where = {out: i for i, node in enumerate(nodes) for out in node.outputs}
    places = sorted(where[name] for name in names)
    parts = [nodes[i] for i in places]
    if any(part.attrs.get("kind") == KIND for part in parts):
        return None
    outputs = {out for part in parts for out in part.outputs}
    inputs = dict.fromkeys(name for part in parts for name in part.inputs)
    if outputs & set(inputs):
        return None
    first, last = places[0], places[-1]
    between = [nodes[i] for i in range(first, last) if i not in places]
    ready = all(where.get(name, -1) < first for name in inputs)
    moved_up = {p for p, value in graph.updates.items() if value in outputs}
    if ready and not any(moved_up & set(node.inputs) for node in between):
        place = first
    elif not any(outputs & set(node.inputs) for node in between):
        place = last
    else:
        return None
    attrs = {"anchor": len(parts) - 1, "kind": KIND}
    results = tuple(out for part in parts for out in part.outputs)
    group = Node("group", tuple(inputs), results, attrs, parts[0].layer, tuple(parts))
    return [group if i == place else node for i, node in enumerate(nodes)
            if i == place or i not in places]  # fmt: skip
