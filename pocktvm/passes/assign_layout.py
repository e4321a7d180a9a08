"""Channels last inside, torch's layout at the border.

    y = conv2d(x, w)            NCHW, OIHW
    →  x' = permute_dims(x, 0 2 3 1);  y' = conv2d(x', w')    NHWC, HWIO (w' stored that way)

With channels last a pixel's channels are one vector: a 1x1 convolution is a plain matrix product,
a depthwise one loads contiguous lanes, a channel's scale and shift is a vector operand. One
explicit permute remains for the image and one wherever a 4-D value meets an operator that fixes its
axes (reshape, matmul, …); a value of one pixel per image converts by a view.

How: 4-D values linked by layout-agnostic operators (elementwise, reductions, slices, concat, …)
form components (union-find). A component that touches an activation slot of a spatial operator
becomes NHWC, one that touches a weight slot becomes HWIO, the rest (attention's [B, H, S, D]) stay
as they are. Where both meet, the activation wins and the weight slot gets an explicit permute.

Parameters: one that is *directly* a convolution's weight is stored HWIO (`Param.perm` says so), and
so are its optimizer states; constants are transposed here. The rule reads only the parameter's role
in the forward program, so that `step` and `predict` agree without seeing each other.

Runs after fold_scales (which looks for [1, C, 1, 1]); simplify behind it merges the views.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pocktvm.ir.graph import Graph, Node, Param, Value
from pocktvm.ir.ops import SPATIAL, is_elementwise
from pocktvm.passes.components import Components
from pocktvm.passes.edit import Editor

Perm = tuple[int, ...] | None
ACTIVATION: tuple[int, ...] = (0, 2, 3, 1)  # NCHW -> NHWC
WEIGHT: tuple[int, ...] = (2, 3, 1, 0)  # OIHW -> HWIO

# operand positions, then the result
SLOTS: dict[str, tuple[Perm, ...]] = {
    "conv2d": (ACTIVATION, WEIGHT, ACTIVATION),
    "conv2d_input_grad": (ACTIVATION, WEIGHT, ACTIVATION),
    "conv2d_weight_grad": (ACTIVATION, ACTIVATION, WEIGHT),
}
KEEPS_RANK = frozenset(
    "sum mean max min prod concat strided_slice strided_slice_grad pad softmax log_softmax "
    "softmax_grad log_softmax_grad broadcast_to cumsum".split()
)
CHANNELS = frozenset({"take", "put"})  # along one axis of a 4-D value, operand 1 are its indices
REDUCES = frozenset("sum mean max min prod".split())


def assign_layout(graph: Graph) -> Graph:
    """Give every component of 4-D values its layout and rewrite the nodes."""
    editor = LayoutEditor(graph, find_layouts(graph))
    for node in graph.nodes:
        editor.rewrite(node)
    return editor.finish_plain()


def slots(node: Node) -> tuple[Perm, ...]:
    """The layouts a spatial operator fixes: of its operands, then of its result."""
    return SLOTS.get(node.op, (ACTIVATION,) * (len(node.inputs) + 1))


def follows(graph: Graph, node: Node) -> bool:
    """True for an operator that works in any order of its 4-D operands' axes."""
    if len(node.outputs) != 1:
        return False
    if node.op in CHANNELS:
        return all(len(graph.values[n].shape) == 4 for n in (node.inputs[0], *node.outputs))
    if is_elementwise(node.op) or node.op in KEEPS_RANK:
        return len(graph.values[node.outputs[0]].shape) == 4
    return False


def find_layouts(graph: Graph) -> dict[str, Perm]:
    """Value -> permutation from torch's axes to the assigned ones, for values that change."""
    links = Components()
    fixed: list[tuple[str, Perm]] = []
    borders = {*graph.inputs, *graph.consts, *graph.params, *graph.scalars}
    for node in graph.nodes:
        names = (*node.inputs, *node.outputs)
        if node.op in SPATIAL:
            fixed += [(n, p) for n, p in zip(names, slots(node), strict=True) if n not in borders]
        elif follows(graph, node):
            linked = [n for n in names if n not in borders and _linkable(graph.values[n])]
            links.join(linked)
        elif node.op == "cross_entropy_grad" and len(graph.values[node.outputs[0]].shape) == 4:
            links.join([node.inputs[0], node.outputs[0]])
    stored = stored_layouts(graph)
    for name in graph.params:
        if perm := stored.get(name):
            fixed += [(v, perm) for p, v in graph.updates.items() if p == name]
    layout: dict[str, Perm] = {}
    for name, perm in sorted(fixed, key=lambda f: f[1] == ACTIVATION):  # activations win
        layout[links.find(name)] = perm
    return {n: layout[links.find(n)] for n in links if links.find(n) in layout}


def _linkable(value: Value) -> bool:
    # a vector of channels converts by a view, so it need not tie two components together
    return len(value.shape) == 4 and sum(d != 1 for d in value.shape) > 1


def stored_layouts(graph: Graph) -> dict[str, Perm]:
    """HWIO for parameters that are directly a convolution's weight, and for their states."""
    weights = {n.inputs[1] for n in graph.nodes if n.op in ("conv2d", "conv2d_input_grad")}
    found: dict[str, Perm] = {}
    for name, param in graph.params.items():
        owner = name.partition("/")[2] if param.kind == "optimizer" else name
        if owner in weights and len(graph.values[name].shape) == 4:
            found[name] = WEIGHT
    return found


def shuffled(shape: tuple[int, ...], perm: Perm) -> tuple[int, ...]:
    """A shape in the assigned order."""
    return tuple(shape) if perm is None else tuple(shape[a] for a in perm)


class LayoutEditor(Editor):
    """An editor that keeps each value in the orders it is read in.

    `home` is the order a value of the old graph is computed or stored in; `forms` holds the new
    names by (old name, order).
    """

    def __init__(self, graph: Graph, layouts: dict[str, Perm]) -> None:
        super().__init__(graph)
        self.layouts = layouts
        self.home: dict[str, Perm] = {}
        self.forms: dict[tuple[str, Perm], str] = {}
        for name, perm in stored_layouts(graph).items():
            if perm is not None:
                self._store(name, perm)

    def _store(self, name: str, perm: tuple[int, ...]) -> None:
        param: Param = self.params[name]
        stored = np.ascontiguousarray(param.value.transpose(perm))
        self.params[name] = replace(param, value=stored, perm=perm)
        self.values[name] = replace(self.values[name], shape=tuple(stored.shape))
        self.home[name] = perm

    def old(self, name: str) -> Value:
        """The value's type before this pass."""
        return self.graph.values[name]

    def read(self, name: str, perm: Perm) -> str:
        """The name that holds `name` in this order; a conversion is made once."""
        home = self.home.get(name)
        if home == perm:
            return self.forms.get((name, perm), name)
        key = (name, perm)
        if key not in self.forms:
            self.forms[key] = self._convert(name, home, perm)
        return self.forms[key]

    def _convert(self, name: str, home: Perm, perm: Perm) -> str:
        source, value = self.forms.get((name, home), name), self.old(name)
        shape = shuffled(value.shape, perm)
        if name in self.graph.consts:
            return self.const(self.graph.consts[name].transpose(perm or range(4)), name)
        back = tuple(range(4)) if home is None else tuple(int(i) for i in np.argsort(home))
        axes = back if perm is None else tuple(back[a] for a in perm)
        suffix = {ACTIVATION: "nhwc", WEIGHT: "hwio", None: "plain"}[perm]
        out = replace(value, name=f"{name}~{suffix}", shape=shape)
        return self.emit("permute_dims", (source,), out, axes=axes)

    def read_broadcast(self, name: str, perm: tuple[int, ...]) -> str:
        """An elementwise operand of any rank, in the order of a 4-D result."""
        value = self.old(name)
        if len(value.shape) == 4:
            return self.read(name, perm)
        if len(value.shape) == 0 or value.size == 1:
            return name
        key = (name, perm)
        if key in self.forms:
            return self.forms[key]
        full = (1,) * (4 - len(value.shape)) + tuple(value.shape)
        if name in self.graph.consts:
            form = self.const(self.graph.consts[name].reshape(full).transpose(perm), name)
        else:
            view = self.emit("reshape", (name,), replace(value, name=f"{name}~4d", shape=full))
            out = replace(value, name=f"{name}~nhwc", shape=shuffled(full, perm))
            form = self.emit("permute_dims", (view,), out, axes=perm)
        self.forms[key] = form
        return form

    def write(self, node: Node, inputs: list[str], perm: Perm, **attrs: object) -> None:
        """Append the node; its first result is in the order `perm`."""
        name = node.outputs[0]
        if perm is not None:
            self.values[name] = replace(self.old(name), shape=shuffled(self.old(name).shape, perm))
            self.home[name] = perm
        self.add(replace(node, inputs=tuple(inputs), attrs={**node.attrs, **attrs}))

    def rewrite(self, node: Node) -> None:
        """Append `node` in its layout, with the conversions it needs."""
        if node.op in SPATIAL and node.attrs.get("layout", "NCHW") == "NCHW":
            perms = slots(node)
            inputs = [self.read(i, p) for i, p in zip(node.inputs, perms, strict=False)]
            self.write(node, inputs, perms[-1], layout="NHWC")
            return
        perm = self._perm(node)
        if perm is not None and follows(self.graph, node):
            self._follow(node, perm)
            return
        if node.op in REDUCES and self._reduce(node):
            return
        if node.op in ("cross_entropy", "cross_entropy_grad") and self._class_axis(node):
            return
        self.write(node, [self.read(i, None) for i in node.inputs], None)

    def _perm(self, node: Node) -> Perm:
        """The layout of a node's result; a vector of channels takes its operand's."""
        out = node.outputs[0]
        if out in self.layouts or _linkable(self.old(out)):
            return self.layouts.get(out)
        homes = [self.home.get(i) for i in node.inputs if _linkable(self.old(i))]
        return next((perm for perm in homes if perm is not None), None)

    def _follow(self, node: Node, perm: tuple[int, ...]) -> None:
        place = {axis: i for i, axis in enumerate(perm)}  # torch's axis -> ours
        attrs: dict[str, object] = {}
        if "axes" in node.attrs and node.attrs["axes"] is not None:
            attrs["axes"] = tuple(sorted(place[a] for a in node.attrs["axes"]))
        if node.attrs.get("axis") is not None:
            attrs["axis"] = place[node.attrs["axis"] % 4]
        for key in ("begin", "end", "strides"):
            if node.attrs.get(key):
                attrs[key] = tuple(node.attrs[key][a] for a in perm)
        if node.op == "pad":
            widths = node.attrs["pad_width"]
            attrs["pad_width"] = tuple(w for a in perm for w in widths[2 * a : 2 * a + 2])
        inputs = [
            i if at == 1 and node.op in CHANNELS else self.read_broadcast(i, perm)
            for at, i in enumerate(node.inputs)
        ]
        self.write(node, inputs, perm, **attrs)

    def _reduce(self, node: Node) -> bool:
        """A reduction that drops axes, where the order of the kept ones does not change."""
        perm, axes = self.home.get(node.inputs[0]), node.attrs.get("axes")
        if perm is None or node.attrs.get("keepdims"):
            return False
        axes = tuple(range(4)) if axes is None else axes
        shape = self.old(node.inputs[0]).shape
        kept = [a for a in perm if a not in axes and shape[a] != 1]
        if kept != sorted(kept):
            return False
        ours = tuple(i for i, a in enumerate(perm) if a in axes)
        x, out = self.read(node.inputs[0], perm), self.old(node.outputs[0])
        left = tuple(shape[a] for a in perm if a not in axes)
        if left == tuple(out.shape):
            self.write(node, [x], None, axes=ours)
            return True
        # axes of length one changed places: the kept numbers are in order, their shape is not
        small = self.declare(f"{out.name}~nhwc", left, out)
        self.add(replace(node, inputs=(x,), outputs=(small,), attrs={**node.attrs, "axes": ours}))
        self.add(Node("reshape", (small,), (out.name,), {}, node.layer))
        return True

    def _class_axis(self, node: Node) -> bool:
        """Cross-entropy of an image: the class axis moves, labels [N, H, W] do not."""
        logits = node.inputs[0]
        perm = self.home.get(logits)
        if perm != ACTIVATION or len(self.old(node.inputs[1]).shape) != 3:
            return False
        inputs = [self.read(logits, perm), *(self.read(i, None) for i in node.inputs[1:])]
        gradient = node.op == "cross_entropy_grad"
        self.write(node, inputs, perm if gradient else None, axis=perm.index(1))
        return True

    def finish_plain(self) -> Graph:
        """Results leave in torch's layout, updates in their parameter's."""
        outputs = {k: self.read(v, None) for k, v in self.graph.outputs.items()}
        updates = {p: self.read(v, self.home.get(p)) for p, v in self.graph.updates.items()}
        return self.finish(outputs=outputs, updates=updates)
