"""The loss and its gradient look at the logits once.

    loss = cross_entropy(z, y); dz = cross_entropy_grad(z, y, d)
    →  dz, loss = cross_entropy_grad(z, y, d)

Both need the largest logit and the sum of exponentials of every row. Apart, three sweeps over the
logits find them twice and three more exponentials are taken; together a row is read from memory
once, its exponentials are written where the gradient will be, and scaled there. With 32000 words
that is 8.2 million exponentials and a pass over 32 MB less.

Declines where the loss is read ahead of the gradient. Runs in front of fuse, after whatever moves
the class axis.
"""

from __future__ import annotations

from dataclasses import replace

from pocktvm.ir.graph import Graph, Node
from pocktvm.passes.edit import Editor


def join_loss(graph: Graph) -> Graph:
    """Give every gradient of a cross-entropy the loss as its second output."""
    pairs = _pairs(graph)
    if not pairs:
        return graph
    gone = {loss.outputs[0] for loss in pairs.values()}
    editor = Editor(graph)
    for node in graph.nodes:
        if node.outputs[0] in pairs:
            loss = pairs[node.outputs[0]].outputs[0]
            editor.add(replace(node, outputs=(node.outputs[0], loss)))
        elif node.outputs[0] not in gone:
            editor.add(node)
    return editor.finish()


def _pairs(graph: Graph) -> dict[str, Node]:
    """Gradient's output -> the loss of the same logits, labels and options."""
    losses = {_key(n, n.inputs): n for n in graph.nodes if n.op == "cross_entropy"}
    seen: set[str] = set()
    pairs: dict[str, Node] = {}
    for node in graph.nodes:
        if node.op == "cross_entropy_grad" and len(node.outputs) == 1:
            loss = losses.pop(_key(node, (*node.inputs[:2], *node.inputs[3:])), None)
            if loss is not None and loss.outputs[0] not in seen:
                pairs[node.outputs[0]] = loss
        seen.update(node.inputs)
    return pairs


def _key(node: Node, inputs: tuple[str, ...]) -> tuple[object, ...]:
    return inputs, tuple(sorted((k, repr(v)) for k, v in node.attrs.items()))
