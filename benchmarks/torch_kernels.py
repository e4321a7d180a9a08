"""A kernel's operators in torch, one after another: what a kernel is compared with.

Each operator is one call of torch, as in the project's reference; convolutions take their padding
themselves and their weights as a channels_last module has them, so that torch's fast paths serve
them. Operands are random and stay in the caches where they fit, which in a step they may not.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pocktvm.ir.graph import Graph, Node, Value
from pocktvm.reference import RULES
from pocktvm.reference.linear import from_nchw, from_oihw, nchw_shape, oihw_shape, to_nchw, to_oihw

CONVOLUTIONS = ("conv2d", "conv2d_input_grad", "conv2d_weight_grad")
SECONDS, LEAST = 0.05, 5  # a kernel is repeated for so long, and so often


class TorchKernels:
    """Times nodes of one graph with `threads` threads of torch."""

    def __init__(self, graph: Graph, threads: int) -> None:
        self.graph = graph
        parts = {n.outputs: n for top in graph.nodes for n in top.body}  # of groups split up
        self.of = {**parts, **{n.outputs: n for n in graph.nodes}}
        torch.set_num_threads(threads)

    def milliseconds(self, outputs: Sequence[str]) -> float | None:
        """The median time of the node that makes `outputs`; None where there is no such node, or
        where it only lays data out anew for us."""
        node = self.of.get(tuple(outputs))
        if node is None or all(n.op == "permute_dims" for n in node.kernel_nodes()):
            return None
        operators = node.kernel_nodes()
        weights = {n.inputs[1] for n in operators if n.op in CONVOLUTIONS[:2]}
        sources = {name: self._operand(name, name in weights) for name in node.inputs}
        times: list[float] = []
        begin = time.perf_counter()
        with torch.no_grad():
            while len(times) <= LEAST or time.perf_counter() - begin < SECONDS:
                start = time.perf_counter()
                _run(operators, sources, self.graph.values)
                times.append((time.perf_counter() - start) * 1e3)
        return statistics.median(times[1:])

    def _operand(self, name: str, weight: bool) -> Tensor:
        """Positive numbers, as square roots and logarithms want them; zeros as indices."""
        value = self.graph.values[name]
        if name in self.graph.consts:
            tensor = torch.from_numpy(np.array(self.graph.consts[name]))
        elif value.dtype == "float32":
            tensor = torch.rand(value.shape)
        else:
            tensor = torch.from_numpy(np.zeros(value.shape, value.dtype))
        if not weight or tensor.ndim != 4:
            return tensor
        memory = torch.channels_last
        return from_oihw(to_oihw(tensor, "NHWC").contiguous(memory_format=memory), "NHWC")


def _run(nodes: Sequence[Node], sources: Mapping[str, Tensor], values: Mapping[str, Value]) -> None:
    tensors = dict(sources)
    for node in nodes:
        outs = [values[name] for name in node.outputs]
        rule = convolution if node.op in CONVOLUTIONS else RULES[node.op]
        results = rule(node, [tensors[name] for name in node.inputs], outs)
        results = results if isinstance(results, tuple) else (results,)
        tensors.update(zip(node.outputs, results, strict=True))


def convolution(node: Node, args: Sequence[Tensor], outs: Sequence[Value]) -> Tensor:
    """One call of torch where the padding is symmetric."""
    layout = str(node.attrs.get("layout", "NCHW"))
    top, left, bottom, right = node.attrs.get("padding", (0, 0, 0, 0))
    if (top, left) != (bottom, right):
        result = RULES[node.op](node, args, outs)
        return result[0] if isinstance(result, tuple) else result
    stride = list(node.attrs.get("strides", (1, 1)))
    dilation = list(node.attrs.get("dilation", (1, 1)))
    groups, padding = int(node.attrs.get("groups", 1)), [top, left]
    if node.op == "conv2d":
        x, w = to_nchw(args[0], layout), to_oihw(args[1], layout)
        return from_nchw(F.conv2d(x, w, None, stride, padding, dilation, groups), layout)
    inner = node.op == "conv2d_input_grad"
    if inner:
        dy, w = to_nchw(args[0], layout), to_oihw(args[1], layout)
        x = dy.new_empty(nchw_shape(outs[0], layout))
    else:
        x, dy = to_nchw(args[0], layout), to_nchw(args[1], layout)
        w = dy.new_empty(oihw_shape(outs[0], layout))
    x, w = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))
    found = torch.ops.aten.convolution_backward(
        dy, x, w, None, stride, padding, dilation, False, [0, 0], groups, [inner, not inner, False]
    )
    return from_nchw(found[0], layout) if inner else from_oihw(found[1], layout)
