"""Compute at build time what only depends on constants.

    m = less(iota_row, iota_column); b = where(m, zero, minus_infinity)   (constants all)
    →  b = const[1, 1, S, S]

Masks, position embeddings of fixed ids, reshaped statistics: each would be a kernel a step. Values
come from the reference, except views, which numpy gives for nothing. Runs after simplify, so that
the operands of a broadcast are not expanded first.

A constant costs memory for as long as the process lives, so growth is refused: a result may be as
large as the constants it is made of, or GROWTH bytes, whichever is more; a plain broadcast is
refused above BROADCAST bytes, since every reader takes the small operand as well.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pocktvm.ir.graph import Graph, Node
from pocktvm.passes.edit import Editor
from pocktvm.reference import eval_node

GROWTH = 256 * 1024  # a causal mask of 256 tokens
BROADCAST = 4096


def fold_constants(graph: Graph) -> Graph:
    """Replace nodes of constants by constants."""
    editor = Editor(graph)
    for node in graph.nodes:
        node = editor.resolved(node)
        if not folds(editor, node):
            editor.add(node)
            continue
        for name, array in zip(node.outputs, _evaluate(editor, node), strict=True):
            editor.replace(name, editor.const(array, node.inputs[0] if node.inputs else name))
    return editor.finish()


def folds(editor: Editor, node: Node) -> bool:
    """True when all operands are constants and the results are not much larger."""
    if node.body or not all(i in editor.consts for i in node.inputs):
        return False
    before = sum(editor.values[i].nbytes for i in node.inputs)
    after = sum(editor.values[o].nbytes for o in node.outputs)
    limit = BROADCAST if node.op == "broadcast_to" else GROWTH
    return after <= max(before, limit)


def _evaluate(editor: Editor, node: Node) -> tuple[np.ndarray, ...]:
    consts: Mapping[str, np.ndarray] = editor.consts
    first = consts[node.inputs[0]] if node.inputs else None
    if node.op == "reshape" and first is not None:
        return (first.reshape(editor.values[node.outputs[0]].shape),)
    if node.op == "permute_dims" and first is not None and node.attrs.get("axes") is not None:
        return (np.ascontiguousarray(first.transpose(node.attrs["axes"])),)
    return eval_node(node, editor.values, consts)
