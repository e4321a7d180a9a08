"""Keep as bfloat16, or in a byte, what the forward pass leaves for the backward pass.

    h = f(x); y = g(h); …; loss; …; dw = k(h)
    →  h = f(x); h16 = pack(h); y = g(h); …; loss; …; h~ = unpack(h16); dw = k(h~)

The memory of a training step is mostly what waits for its backward pass: MobileNetV2's, trained in
full, needs 38.3 instead of 75.1 MB beside its weights, a six-layer encoder's 81.8 instead of 149.6
(docs/memory.md). The forward pass reads h itself: the loss of given weights stays what it was, and
gradients are off by what rounding the saved values to eight bits makes of them.
What is narrowed: float32 values above SMALL bytes that the forward pass computes, whose first
reader in the backward pass is SPAN nodes or more behind the last one in the forward pass. Inputs,
parameters and results stay as they are.

`pack` stands right behind its value, where `fuse` makes it one more output of the kernel that
computes it; the wide copy exists from its first reader to its last, and is made anew for readers
more than NEAR nodes apart. Where only elementwise operators read it, it exists in registers.

With "int8" what waits for weight gradients alone takes a byte an element: outputs of ReLU6 in 255
steps from 0 to 6, everything else as integers below 2**7 with an exponent for each vector of
channels, which the kernel that computes them writes too (schedule/blocks.py): neither needs a
second look at the data. save_masks, in front, has taken what ReLUs ask. What other gradients read
(softmax, GELU, norms, attention's operands) stays bfloat16, as does everything on targets without
vectors.

Asked for by `--saved bf16` and `--saved int8`. Runs in front of fuse. Source: bfloat16 activations
as in Kalamkar et al. 2019; saving narrow and computing wide as in Jain et al. 2018 ("Gist");
integers for activations saved as in Chen et al. 2021 ("ActNN").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pocktvm.ir.graph import Graph, Node, Value
from pocktvm.ir.ops import VIEWS
from pocktvm.ir.target import Target
from pocktvm.passes.edit import Editor
from pocktvm.passes.liveness import forward_nodes, roots

SMALL = 16384  # bytes; below that a value's share of the peak does not pay for two conversions
SPAN = 8  # nodes a value waits at least: what is read sooner is no part of the peak
NEAR = 16  # nodes between readers that share a wide copy
RELU6 = 6.0  # the top of its range


@dataclass(frozen=True)
class _Cluster:
    """Readers that share a wide copy of `root`: node index -> the names of it that it reads."""

    root: str
    reads: dict[int, tuple[str, ...]]
    kept: str  # bf16 | u8 | i8

    @property
    def names(self) -> tuple[str, ...]:
        """What the copy is read as, in order: the value itself or views of it."""
        return tuple(dict.fromkeys(name for names in self.reads.values() for name in names))


def narrow_saved(graph: Graph, saved: str = "bf16", target: Target | None = None) -> Graph:
    """The graph with its saved activations as `saved` says, "bf16" or "int8"; a program without a
    loss stays as it is."""
    group = 0 if saved == "bf16" else 16 if target is None else target.isa.lanes
    clusters = _clusters(graph, group) if "loss" in graph.outputs else []
    if not clusters:
        return graph
    editor = Editor(graph)
    kept = {c.root: c.kept for c in clusters}
    packed: dict[str, tuple[str, ...]] = {}
    wide: dict[int, dict[str, str]] = {}  # node -> what it reads instead
    for index, node in enumerate(graph.nodes):
        for cluster in (c for c in clusters if min(c.reads) == index):
            names = _widen(editor, cluster, packed[cluster.root], node.layer, group)
            for reader in cluster.reads:
                wide.setdefault(reader, {}).update(names)
        editor.add(node.with_inputs(wide.get(index, {})))
        for name in (o for o in node.outputs if o in kept):
            packed[name] = _pack(editor, name, kept[name], node.layer, group)
    return editor.finish()


def _pack(editor: Editor, name: str, kept: str, layer: str, group: int) -> tuple[str, ...]:
    """Emit the narrow copy; its values."""
    shape = editor.values[name].shape
    if kept != "i8":
        attrs = _attrs(kept, group)
        out = Value(f"{name}~{kept}", shape, "uint8" if kept == "u8" else "uint16")
        return (editor.emit(f"pack_{kept}", (name,), out, layer, **attrs),)
    blocks = shape[-1] // group + (shape[-1] % group).bit_count()
    codes, exponents = (editor.fresh(f"{name}~{part}") for part in ("i8", "exponents"))
    editor.values[codes] = Value(codes, shape, "int8")
    editor.values[exponents] = Value(exponents, (*shape[:-1], blocks), "uint8")
    editor.add(Node("pack_i8", (name,), (codes, exponents), _attrs(kept, group), layer))
    return codes, exponents


def _attrs(kept: str, group: int) -> dict[str, Any]:
    attrs: dict[str, dict[str, Any]] = {"u8": {"top": RELU6}, "i8": {"group": group}}
    return attrs.get(kept, {})


def _widen(
    editor: Editor, cluster: _Cluster, packed: tuple[str, ...], layer: str, group: int
) -> dict[str, str]:
    """Emit the wide copy; old name -> new name. bfloat16 is widened in the shape it is read in
    first, so that what reads it can join it. Views of either cost nothing."""
    read = cluster.names if cluster.kept == "bf16" else (cluster.root, *cluster.names)
    first, *others = dict.fromkeys(read)
    shape, narrow = editor.values[first].shape, editor.values[packed[0]]
    if shape != narrow.shape:
        seen = Value(f"{narrow.name}~as", shape, narrow.dtype)
        packed = (editor.emit("reshape", (narrow.name,), seen, layer),)
    out, attrs = Value(f"{first}~wide", shape), _attrs(cluster.kept, group)
    wide = editor.emit(f"unpack_{cluster.kept}", packed, out, layer, **attrs)
    names = {first: wide}
    for other in others:
        out = Value(f"{other}~wide", editor.values[other].shape)
        names[other] = editor.emit("reshape", (wide,), out, layer)
    return names


def _clusters(graph: Graph, group: int) -> list[_Cluster]:
    """What is narrowed, to what, and for whom it is widened again; `group`: channels of a block, 0
    where all is kept as bfloat16."""
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
    waits = [n for n, late in reads.items() if late and min(late) - last[n] >= SPAN]
    form = {n: _kept(graph, n, graph.nodes[maker[n]], reads[n], group) for n in waits}
    return [_Cluster(name, part, form[name]) for name in waits for part in _near(reads[name])]


def _kept(
    graph: Graph, name: str, maker: Node, late: dict[int, tuple[str, ...]], group: int
) -> str:
    """The form a value waits in: a byte where only weight gradients read it."""
    reads = [(graph.nodes[i], n) for i, names in late.items() for n in names]
    if not group or not all(_is_weight_operand(graph, node, n) for node, n in reads):
        return "bf16"
    if maker.op == "relu6":
        return "u8"
    return "i8" if group >= 4 and graph.values[name].shape[-1] >= group else "bf16"


def _is_weight_operand(graph: Graph, node: Node, name: str) -> bool:
    """True when a node makes a weight's gradient of the value, or cuts out what one is made of."""
    if node.op == "strided_slice":
        made = node.outputs[0]
        users = (n for n in graph.nodes if made in n.inputs)
        return all(_is_weight_operand(graph, user, made) for user in users)
    if node.op == "conv2d_weight_grad":
        return name == node.inputs[0] != node.inputs[1]
    rows = node.op == "matmul" and node.attrs.get("transpose_a")  # summed over, on either side
    return bool(rows) and len(graph.values[name].shape) == 2  # not attention's


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
