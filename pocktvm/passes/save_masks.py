"""Keep one bit of an activation where its gradient asks nothing else of it.

    y = relu6(x); …forward…; loss; …backward…; dx = relu6_grad(dy, y)
    →  y = relu6(x); m = pack_mask(y); …; loss; …; dx = apply_mask(dy, m)

The gradient of ReLU, ReLU6 or a clip passes or it does not. Where no weight gradient wants y itself
(the weights behind it are frozen), all that the backward pass reads of y is a bit an element.
MobileNetV2 at batch 8 of 128 pixels keeps at most 6.3 instead of 12.5 MB beside its weights with
the published scheme, and with the biases of all blocks 16.4 instead of 59.8 (docs/passes.md).
What is packed: float32 values above SMALL bytes that the forward pass computes and whose readers in
the backward pass are gradients with one and the same test, SPAN nodes or more behind the forward
pass's last reader. Slices of y that only the backward pass reads (the channels that learn of the
weight behind it) are taken right behind y instead, where y still is in cache.

Bits lie along the last axis, the channels, from the lowest bit up, rows padded to whole bytes. A
byte holds the channels of one vector, at most eight: four where vectors have four floats and a sum
of four lanes is the way to get a word (NEON), one where there are no vectors or every element is
another thread's. `pack_mask` stands right behind y, where `fuse` makes it one more output of the
kernel that computes y.

With `--saved int8` a mask is kept beside what the weights' gradients read, for narrow_saved makes a
byte of that, from which a mask could not be told.

Runs behind index_pools, in front of narrow_saved and fuse. Source: masks of one bit as in Jain et
al. 2018 ("Gist"), for frozen weights as in Cai et al. 2020 ("TinyTL").
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pocktvm.ir.graph import Graph, Node, Value
from pocktvm.ir.ops import VIEWS
from pocktvm.ir.target import Target
from pocktvm.passes.edit import Editor
from pocktvm.passes.liveness import forward_nodes, roots

SMALL = 16384  # bytes; below that a value's share of the peak does not pay for another output
SPAN = 8  # nodes a value waits at least: what is read sooner is no part of the peak
GRADIENTS = ("relu_grad", "relu6_grad", "clip_grad")


@dataclass
class _Saved:
    """Who reads a value in the backward pass: gradients (node -> the name read), slices."""

    masked: dict[int, str]
    slices: list[int]
    waits: int  # nodes


def save_masks(graph: Graph, target: Target | None = None, beside: bool = False) -> Graph:
    """The graph with bits for activations, with `beside` also for those of which other readers want
    more; a program without a loss stays as it is."""
    group = channels_a_byte(target)
    saved = _saved(graph, group, beside) if "loss" in graph.outputs else {}
    if not saved:
        return graph
    editor = Editor(graph)
    early = {i for s in saved.values() for i in s.slices}
    masked = {i: root for root, s in saved.items() for i in s.masked}
    packed: dict[str, str] = {}
    for index, node in enumerate(graph.nodes):
        if index in masked:
            name = saved[masked[index]].masked[index]
            mask = _seen_as(editor, packed[masked[index]], graph.values[name], group)
            read = (node.inputs[0], mask)
            attrs = {"group": group, **_test(node)}
            editor.add(Node("apply_mask", read, node.outputs, attrs, node.layer))
            continue
        if index not in early:
            editor.add(node)
        for name in (o for o in node.outputs if o in saved):
            for i in saved[name].slices:
                editor.add(graph.nodes[i])
            test = _test(graph.nodes[next(iter(saved[name].masked))])
            out = Value(f"{name}~mask", _packed(graph.values[name].shape, group), "uint8")
            packed[name] = editor.emit("pack_mask", (name,), out, node.layer, group=group, **test)
    return editor.finish()


def channels_a_byte(target: Target | None) -> int:
    """How many channels share a byte: those of a vector, at most eight."""
    if target is None:
        return 8
    return 1 if target.is_gpu else min(8, target.isa.lanes)


def _packed(shape: tuple[int, ...], group: int) -> tuple[int, ...]:
    return (*shape[:-1], -(-shape[-1] // group))


def _seen_as(editor: Editor, mask: str, value: Value, group: int) -> str:
    """The mask in the shape of a view of what it was packed from."""
    shape = _packed(value.shape, group)
    if editor.values[mask].shape == shape:
        return mask
    return editor.emit("reshape", (mask,), Value(f"{mask}~as", shape, "uint8"))


def _saved(graph: Graph, group: int, beside: bool) -> dict[str, _Saved]:
    """What is kept as bits, by name."""
    root, forward = roots(graph, graph.nodes), forward_nodes(graph)
    kept = {root.get(name, name) for name in graph.results()}
    found: dict[str, _Saved] = {}
    last: dict[str, int] = {}
    spoilt: set[str] = set()
    for index, node in enumerate(graph.nodes):
        if index in forward and node.op not in VIEWS:
            for out in node.outputs:
                if _is_large(graph.values[out], group) and out not in kept:
                    found[out] = _Saved({}, [], 0)
                    last[out] = index
        for name in () if node.op in VIEWS else dict.fromkeys(node.inputs):
            value = root.get(name, name)
            if value not in found:
                continue
            if index in forward:
                last[value] = index
            elif beside and node.op not in GRADIENTS:
                continue
            elif not _note(graph, found[value], index, node, name, value, group):
                spoilt.add(value)
    for name, saved in found.items():
        saved.waits = min(saved.masked, default=0) - last[name]
    return {
        name: s
        for name, s in found.items()
        if name not in spoilt and s.masked and s.waits >= SPAN and _smaller(graph, name, s, group)
    }


def _note(
    graph: Graph, saved: _Saved, index: int, node: Node, name: str, value: str, group: int
) -> bool:
    """Write down a reader of the backward pass; False where it asks for more than a bit."""
    if node.op == "strided_slice" and name == value:
        saved.slices.append(index)
        return True
    if node.op not in GRADIENTS or node.inputs[0] == name:
        return False
    if graph.values[node.outputs[0]].shape != graph.values[name].shape:
        return False
    if not _rows_agree(graph, name, value, group):
        return False
    first = graph.nodes[next(iter(saved.masked), index)]
    saved.masked[index] = name
    return _test(first) == _test(node)


def _test(node: Node) -> dict[str, Any]:
    """What a gradient asks of the value: its forward operator, and a clip's bounds."""
    return {"test": node.op.removesuffix("_grad"), **node.attrs}


def _is_large(value: Value, group: int) -> bool:
    rows = value.shape and value.shape[-1] >= group
    return bool(rows) and value.dtype == "float32" and value.nbytes > SMALL


def _rows_agree(graph: Graph, view: str, value: str, group: int) -> bool:
    """True when a view's bits lie where the value's do: equal rows, or rows without padding."""
    a, b = graph.values[view].shape, graph.values[value].shape
    return bool(a) and (a[-1] == b[-1] or (a[-1] % group == 0 and b[-1] % group == 0))


def _smaller(graph: Graph, name: str, saved: _Saved, group: int) -> bool:
    """True when bits and slices together are less than the value."""
    value = graph.values[name]
    slices = sum(graph.values[graph.nodes[i].outputs[0]].nbytes for i in saved.slices)
    return slices + math.prod(_packed(value.shape, group)) < value.nbytes
