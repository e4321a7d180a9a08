"""Update only the rows of a table that were looked up.

    dtable = take_grad(dy, ids);  new = table - lr * dtable
    →  new = take_update(table, dy, ids, lr)                in place: table[ids] -= lr * dy

The gradient of an embedding is zero but for the batch's rows. Plain SGD leaves the other rows as
they are, so neither a gradient of the table's size is kept (94 MB of a 30 522 x 768 vocabulary) nor
is the table read and written. Momentum, decay and Adam move every row and keep the dense form, as
in torch.

Runs in front of fuse, which would swallow the subtraction.
"""

from __future__ import annotations

from pocktvm.ir.graph import Graph, Node
from pocktvm.passes.edit import Editor


def scatter_updates(graph: Graph) -> Graph:
    """Rewrite every update that is nothing but a step along a gradient of looked-up rows."""
    makers, updated = graph.producers(), {v: p for p, v in graph.updates.items()}
    editor = Editor(graph)
    for node in graph.nodes:
        found = _scattered(node, makers, editor, updated)
        editor.add(found or node)
    return editor.finish()


def _scattered(
    node: Node, makers: dict[str, Node], editor: Editor, updated: dict[str, str]
) -> Node | None:
    """take_update for `table - lr * take_grad(…)` where nobody else reads the parts."""
    table = updated.get(node.outputs[0]) if len(node.outputs) == 1 else None
    if node.op != "subtract" or table is None or node.inputs[0] != table:
        return None
    product = makers.get(node.inputs[1])
    if product is None or product.op != "multiply" or editor.uses[node.inputs[1]] != 1:
        return None
    for rate, name in (product.inputs, product.inputs[::-1]):
        grad = makers.get(name)
        lone = grad is not None and grad.op == "take_grad" and editor.uses[name] == 1
        if grad is not None and lone and editor.graph.values[rate].shape == ():
            return Node("take_update", (table, *grad.inputs, rate), node.outputs, grad.attrs,
                        node.layer)  # fmt: skip
    return None
