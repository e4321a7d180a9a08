"""Move a channel's scale from the image to the weight.

    y  = multiply(conv2d(x, W), s)            →  y  = conv2d(x, W * s)          W constant
    dx = conv2d_input_grad(dy * s, W)         →  dx = conv2d_input_grad(dy, W * s)
    dW = conv2d_weight_grad(x, dy * s)        →  dW = conv2d_weight_grad(x, dy) * s
    db = sum(dy * s, all but channels)        →  db = sum(dy, …) * s
    (x + b) * s, b and s constant             →  x * s + (b * s)

A batch norm after differentiation is a scale and a shift of each channel (shape [1, C, 1, 1]).
Applied to an image it is a multiplication per pixel, and in the backward pass it makes a second
tensor as large as dy that lives beside dy; applied to the weight it is nothing (a constant weight)
or a multiplication of a few thousand numbers (a trained one). The rules are linear algebra, exact
up to one rounding. A *trained* weight keeps its raw value and takes the forward scale in the
epilogue. The same holds for matmul with a scale along its columns. Layout-independent, but the
shapes looked for are NCHW's: run it after simplify and before assign_layout.

The backward rules need every reader of dy * s to be one of them: otherwise dy * s exists anyway.
They decline for a trained weight larger than dy, as the last stages of a ResNet have it: the scaled
copy of the weight would be the larger tensor (4.2 MB at ResNet-50's peak).
Source of the forward fold: Jacob et al. 2018, section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pocktvm.ir.graph import Graph, Node, Value
from pocktvm.passes.edit import Editor


@dataclass(frozen=True)
class Scaled:
    """The value `x * s`, s one number per index of `axis`."""

    x: str
    scale: str
    axis: int


def fold_scales(graph: Graph) -> Graph:
    """Apply the rules once, in order (a chain of scales is one after simplify)."""
    editor = ScaleEditor(graph)
    for node in graph.nodes:
        node = editor.resolved(node)
        if not editor.rewrite(node):
            editor.add(node)
    return editor.finish()


class ScaleEditor(Editor):
    """An editor that knows which values are scaled images."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph)
        self.readers = graph.users()
        self.results = graph.results()

    def rewrite(self, node: Node) -> bool:
        """Append what replaces `node`; False when no rule applies."""
        if node.op == "multiply":
            return self.forward(node)
        if node.op == "conv2d_input_grad":
            return self.input_gradient(node)
        if node.op == "conv2d_weight_grad":
            return self.weight_gradient(node)
        if node.op == "sum":
            return self.channel_sum(node)
        return node.op == "matmul" and self.matmul(node)

    def scaled(self, name: str) -> Scaled | None:
        """`name` as x * s along one axis, when that is how it is computed."""
        node = self.producer.get(name)
        if node is None or node.op != "multiply":
            return None
        for x, s in (node.inputs, node.inputs[::-1]):
            axis = self.vector_axis(s, self.values[name])
            if axis is not None and self.values[x].shape == self.values[name].shape:
                return Scaled(x, s, axis)
        return None

    def vector_axis(self, scale: str, like: Value) -> int | None:
        """The axis of `like` along which `scale` varies; None unless it is exactly one."""
        shape = self.values[scale].shape
        if len(shape) > len(like.shape) or self.values[scale].dtype != "float32":
            return None
        shape = (1,) * (len(like.shape) - len(shape)) + tuple(shape)
        varying = [i for i, d in enumerate(shape) if d != 1]
        if len(varying) != 1 or shape[varying[0]] != like.shape[varying[0]]:
            return None
        return varying[0]

    def product(self, weight: str, scale: str, axis: int, layer: str) -> str:
        """weight * scale along the weight's `axis`: a constant, or a small multiplication."""
        w = self.values[weight]
        shape = tuple(w.shape[i] if i == axis else 1 for i in range(len(w.shape)))
        if weight in self.consts and scale in self.consts:
            return self.const(self.consts[weight] * self.consts[scale].reshape(shape), weight)
        vector = self.view(scale, shape, layer)
        out = Value(f"{weight}~scaled", tuple(w.shape), w.dtype, "activation")
        return self.emit("multiply", (weight, vector), out, layer)

    def view(self, name: str, shape: tuple[int, ...], layer: str) -> str:
        """`name` in another shape: a view, or a constant of its own."""
        value = self.values[name]
        if tuple(value.shape) == shape:
            return name
        if name in self.consts:
            return self.const(self.consts[name].reshape(shape), name)
        out = Value(f"{name}~view", shape, value.dtype, value.role)
        return self.emit("reshape", (name,), out, layer)

    def forward(self, node: Node) -> bool:
        """conv(x, W) * s, matmul(x, W) * s and (y + b) * s with constants."""
        out = self.values[node.outputs[0]]
        for y, s in (node.inputs, node.inputs[::-1]):
            axis = self.vector_axis(s, out)
            inner = self.producer.get(y)
            known = s in self.consts and axis is not None and inner is not None
            if not known or self.uses.get(y, 0) != 1 or self.values[y].shape != out.shape:
                continue
            assert inner is not None and axis is not None
            if inner.op == "conv2d" and axis == 1 and inner.inputs[1] in self.consts:
                return self._scale_weight(node, inner, s, 0)
            if inner.op == "matmul" and axis == len(out.shape) - 1:
                w = self.values[inner.inputs[1]]
                if inner.inputs[1] in self.consts:
                    column = len(w.shape) - (2 if inner.attrs.get("transpose_b") else 1)
                    return self._scale_weight(node, inner, s, column)
            shifted = inner.op in ("add", "subtract") and inner.inputs[1] in self.consts
            if shifted and self._distribute(node, inner, s, axis):
                return True
        return False

    def _scale_weight(self, node: Node, inner: Node, scale: str, axis: int) -> bool:
        weight = self.product(inner.inputs[1], scale, axis, node.layer)
        out = self.values[node.outputs[0]]
        name = self.emit(inner.op, (inner.inputs[0], weight), out, inner.layer, **inner.attrs)
        self.replace(node.outputs[0], name)
        return True

    def _distribute(self, node: Node, inner: Node, scale: str, axis: int) -> bool:
        """(y + b) * s → y * s + b * s, when y * s folds further into a constant weight."""
        y, b = inner.inputs
        out, source = self.values[node.outputs[0]], self.producer.get(y)
        if source is None or source.op not in ("conv2d", "matmul") or self.uses.get(y, 0) != 1:
            return False
        if self.values[y].shape != out.shape or source.inputs[1] not in self.consts:
            return False
        shift = self.consts[b] * self.consts[scale]
        if shift.size > self.consts[scale].size:
            return False
        scaled = Node("multiply", (y, scale), (self.declare(f"{y}~scaled", out.shape, out),))
        self.uses[scaled.outputs[0]] = 1
        if not self.forward(scaled):
            return False
        operands = (self.resolve(scaled.outputs[0]), self.const(shift.astype(np.float32), b))
        self.replace(node.outputs[0], self.emit(inner.op, operands, out, node.layer))
        return True

    def movable(self, name: str) -> Scaled | None:
        """The scaled image `name`, when all its readers can take the scale themselves."""
        found = self.scaled(name)
        if found is None or found.axis != 1 or name in self.results:
            return None
        originals = [old for old, new in self.alias.items() if new == name] + [name]
        readers = [r for o in originals for r in self.readers.get(o, ())]
        return found if all(self._takes(r, name) for r in readers) else None

    def _takes(self, reader: Node, name: str) -> bool:
        position = {"conv2d_input_grad": 0, "conv2d_weight_grad": 1, "sum": 0}.get(reader.op)
        if position is None or reader.attrs.get("layout") == "NHWC":
            return False
        operands = [self.resolve(i) for i in reader.inputs]
        if operands.count(name) != 1 or operands[position] != name:
            return False
        if reader.op == "conv2d_input_grad" and operands[1] not in self.consts:
            # A trained weight is multiplied anew each step: not where it is the larger one.
            return self.values[operands[1]].nbytes < self.values[name].nbytes
        return reader.op != "sum" or _sums_all_but(reader, 1, len(self.values[name].shape))

    def input_gradient(self, node: Node) -> bool:
        """dx = conv2d_input_grad(dy * s, W)."""
        dy = self.movable(node.inputs[0])
        if dy is None:
            return False
        weight = self.product(node.inputs[1], dy.scale, 0, node.layer)
        out = self.values[node.outputs[0]]
        name = self.emit(node.op, (dy.x, weight), out, node.layer, **node.attrs)
        self.replace(node.outputs[0], name)
        return True

    def weight_gradient(self, node: Node) -> bool:
        """dW = conv2d_weight_grad(x, dy * s)."""
        dy = self.movable(node.inputs[1])
        if dy is None:
            return False
        out = self.values[node.outputs[0]]
        raw = self.emit(node.op, (node.inputs[0], dy.x), out, node.layer, **node.attrs)
        self._multiply_result(node, raw, dy.scale, (out.shape[0], 1, 1, 1))
        return True

    def channel_sum(self, node: Node) -> bool:
        """db = sum(dy * s) over everything but the channels."""
        dy = self.movable(node.inputs[0])
        rank = len(self.values[node.inputs[0]].shape)
        if dy is None or not _sums_all_but(node, dy.axis, rank):
            return False
        out = self.values[node.outputs[0]]
        raw = self.emit(node.op, (dy.x,), out, node.layer, **node.attrs)
        self._multiply_result(node, raw, dy.scale, tuple(out.shape))
        return True

    def _multiply_result(self, node: Node, raw: str, scale: str, shape: tuple[int, ...]) -> None:
        out = self.values[node.outputs[0]]
        vector = self.view(scale, shape, node.layer)
        self.replace(node.outputs[0], self.emit("multiply", (raw, vector), out, node.layer))

    def matmul(self, node: Node) -> bool:
        """(x * s) W with s along the contraction and W constant: x (s * W)."""
        a, b = node.inputs
        found = self.scaled(a)
        if found is None or b not in self.consts or found.scale not in self.consts:
            return False
        contraction = len(self.values[a].shape) - (2 if node.attrs.get("transpose_a") else 1)
        if found.axis != contraction or self.uses.get(a, 0) != 1 or a in self.results:
            return False
        rank = len(self.values[b].shape)
        row = rank - (1 if node.attrs.get("transpose_b") else 2)
        weight = self.product(b, found.scale, row, node.layer)
        out = self.values[node.outputs[0]]
        name = self.emit(node.op, (found.x, weight), out, node.layer, **node.attrs)
        self.replace(node.outputs[0], name)
        return True


def _sums_all_but(node: Node, axis: int, rank: int) -> bool:
    axes = node.attrs.get("axes")
    axes = tuple(range(rank)) if axes is None else tuple(axes)
    return sorted(axes) == [i for i in range(rank) if i != axis]
