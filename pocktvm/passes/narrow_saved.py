"""Keep as bfloat16 what the forward pass leaves for the backward pass.

    h = f(x); y = g(h); …; loss; …; dw = k(h)
    →  h = f(x); h16 = pack(h); y = g(h); …; loss; …; h~ = unpack(h16); dw = k(h~)

The memory of a training step is mostly what waits for its backward pass: MobileNetV2's, trained in
full, needs 38.6 instead of 75.0 MB beside its weights, a six-layer encoder's 81.8 instead of 149.6
(docs/memory.md). The forward pass reads h itself: the loss of given weights stays what it was, and
gradients are off by what rounding the saved values to eight bits makes of them.
What is narrowed: float32 values above SMALL bytes that the forward pass computes, whose first
reader in the backward pass is SPAN nodes or more behind the last one in the forward pass. Inputs,
parameters and results stay as they are.

`pack` stands right behind its value, where `fuse` makes it one more output of the kernel that
computes it; the wide copy exists from its first reader to its last, and is made anew for readers
more than NEAR nodes apart. Where only elementwise operators read it, it exists in registers.

Asked for by `--saved bf16`. Runs in front of fuse. Source: bfloat16 activations as in Kalamkar et
al. 2019; saving narrow and computing wide as in Jain et al. 2018 ("Gist").
"""

from __future__ import annotations

from dataclasses import dataclass

from pocktvm.ir.graph import Graph, Value
from pocktvm.ir.ops import VIEWS
from pocktvm.passes.edit import Editor
from pocktvm.passes.liveness import forward_nodes, roots

SMALL = 16384  # bytes; below that a value's share of the peak does not pay for two conversions
SPAN = 8  # nodes a value waits at least: what is read sooner is no part of the peak
NEAR = 16  # nodes between readers that share a wide copy


@dataclass(frozen=True)
class _Cluster:
    """Readers that share a wide copy of `root`: node index -> the names of it that it reads."""

    root: str
    reads: dict[int, tuple[str, ...]]

    @property
    def names(self) -> tuple[str, ...]:
        """What the copy is read as, in order: the value itself or views of it."""
        return tuple(dict.fromkeys(name for names in self.reads.values() for name in names))


def narrow_saved(graph: Graph) -> Graph:
    """The graph with its saved activations as bfloat16; a program without a loss stays as it is."""
    clusters = _clusters(graph) if "loss" in graph.outputs else []
    if not clusters:
        return graph
    editor = Editor(graph)
    saved = dict.fromkeys(c.root for c in clusters)
    packed: dict[str, str] = {}
    wide: dict[int, dict[str, str]] = {}  # node -> what it reads instead
    for index, node in enumerate(graph.nodes):
        for cluster in (c for c in clusters if min(c.reads) == index):
            names = _widen(editor, cluster, packed[cluster.root], node.layer)
            for reader in cluster.reads:
                wide.setdefault(reader, {}).update(names)
        editor.add(node.with_inputs(wide.get(index, {})))
        for name in (o for o in node.outputs if o in saved):
            out = Value(f"{name}~bf16", graph.values[name].shape, "uint16")
            packed[name] = editor.emit("pack_bf16", (name,), out, node.layer)
    return editor.finish()


def _widen(editor: Editor, cluster: _Cluster, packed: str, layer: str) -> dict[str, str]:
    """Emit the wide copy in the shape it is read in first, so that what reads it can join it;
    old name -> new name. Views of the narrow value cost nothing."""
    first, *others = cluster.names
    shape = editor.values[first].shape
    if shape != editor.values[packed].shape:
        packed = editor.emit("reshape", (packed,), Value(f"{packed}~as", shape, "uint16"), layer)
    wide = editor.emit("unpack_bf16", (packed,), Value(f"{first}~wide", shape), layer)
    names = {first: wide}
    for other in others:
        out = Value(f"{other}~wide", editor.values[other].shape)
        names[other] = editor.emit("reshape", (wide,), out, layer)
    return names


def _clusters(graph: Graph) -> list[_Cluster]:
    """What is narrowed, and for whom it is widened again."""
    root, results = roots(graph, graph.nodes), graph.results()
    kept = {root.get(name, name) for name in results}
    forward = forward_nodes(graph)
    reads: dict[str, dict[int, tuple[str, ...]]] = {
        out: {}
        for index, node in enumerate(graph.nodes)
        if index in forward and node.op not in VIEWS
        for out in node.outputs
        if _is_large(graph.values[out]) and out not in kept
    }
    maker = {out: index for index, node in enumerate(graph.nodes) for out in node.outputs}
    last = {name: maker[name] for name in reads}
    for index, node in enumerate(graph.nodes):
        for name in dict.fromkeys(node.inputs):
            value = root.get(name, name)
            if value not in reads or node.op in VIEWS:
                continue
            if index in forward:
                last[value] = index
            else:
                reads[value][index] = (*reads[value].get(index, ()), name)
    waits = (n for n, late in reads.items() if late and min(late) - last[n] >= SPAN)
    return [_Cluster(name, part) for name in waits for part in _near(reads[name])]


def _is_large(value: Value) -> bool:
    return value.dtype == "float32" and value.nbytes > SMALL


def _near(reads: dict[int, tuple[str, ...]]) -> list[dict[int, tuple[str, ...]]]:
    """The readers, cut where two are far apart."""
    parts: list[dict[int, tuple[str, ...]]] = []
    for index, names in sorted(reads.items()):
        if not parts or index - max(parts[-1]) > NEAR:
            parts.append({})
        parts[-1][index] = names
    return parts
