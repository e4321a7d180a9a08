"""A matrix product C[batch, M, N] = A B, read off a node: what the matmul rule works on.

`matmul` itself, and the 1x1 convolutions of NHWC tensors, which are products over pixels:
forward X[P, I] W[I, O], input gradient dY[P, O] W^T, weight gradient X^T[I, P] dY[P, O].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pocktvm.ir.graph import Node
from pocktvm.schedule.rule import Task

CONVOLUTIONS = ("conv2d", "conv2d_input_grad", "conv2d_weight_grad")


@dataclass(frozen=True)
class Gemm:
    """Names and sizes; A is stored [K, M] when transpose_a, B [N, K] when transpose_b."""

    a: str
    b: str
    c: str
    m: int
    n: int
    k: int
    transpose_a: bool = False
    transpose_b: bool = False
    batch: int = 1
    a_batched: bool = False
    b_batched: bool = False
    causal: str = ""  # "a" or "result": half of it is zero, or not wanted (ir/ops.py)

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        whole = 2 * self.batch * self.m * self.n * self.k
        return whole // 2 if self.causal else whole


def describe(task: Task) -> Gemm | str:
    """The product a task computes, or why it is none."""
    node = task.anchor
    if node is None:
        return "no anchor"
    if task.node.attrs.get("kind") == "products":
        return "several products"
    if node.op != "matmul" and node.op not in CONVOLUTIONS:
        return f"'{node.op}' is no matrix product"
    if any(task.values[name].dtype != "float32" for name in (*node.inputs, *node.outputs)):
        return "not float32"
    if any(name not in task.node.inputs for name in node.inputs):
        return "an operand is computed inside the group"
    gemm = _matmul(task, node) if node.op == "matmul" else pointwise(task, node)
    if isinstance(gemm, Gemm) and min(gemm.m, gemm.n, gemm.k, gemm.batch) < 1:
        return "an empty product"
    return gemm


def _matmul(task: Task, node: Node) -> Gemm | str:
    a, b = (task.shape(name) for name in node.inputs)
    if len(a) < 2 or len(b) < 2:
        return "a vector operand"
    ta, tb = bool(node.attrs.get("transpose_a")), bool(node.attrs.get("transpose_b"))
    m, k = (a[-1], a[-2]) if ta else a[-2:]
    n = b[-2] if tb else b[-1]
    head_a, head_b = a[:-2], b[:-2]
    count_a, count_b = math.prod(head_a), math.prod(head_b)
    (x, y), c = node.inputs, node.outputs[0]
    if count_b == 1 and not ta:  # rows of the whole batch are rows of one product
        return Gemm(x, y, c, count_a * m, n, k, ta, tb)
    if count_a == 1 or count_b == 1 or head_a == head_b:
        batch, causal = max(count_a, count_b), str(node.attrs.get("causal", ""))
        return Gemm(x, y, c, m, n, k, ta, tb, batch, count_a > 1, count_b > 1, causal)
    return f"batch axes {list(head_a)} and {list(head_b)} broadcast"


def pointwise(task: Task, node: Node) -> Gemm | str:
    """The product of a 1x1 convolution or one of its gradients, or why it is none."""
    attrs = node.attrs
    if attrs.get("layout", "NCHW") != "NHWC":
        return "a convolution in NCHW"
    weight = node.outputs[0] if node.op == "conv2d_weight_grad" else node.inputs[1]
    kernel = task.shape(weight)
    if kernel[:2] != (1, 1):
        return f"a {kernel[0]}x{kernel[1]} kernel"
    unit = (1, 1)
    if tuple(attrs.get("strides", unit)) != unit or attrs.get("groups", 1) != 1:
        return "a strided or grouped convolution"
    if any(attrs.get("padding", ())):
        return "a padded 1x1 convolution"
    first, c = task.shape(node.inputs[0]), node.outputs[0]
    pixels = math.prod(first[:-1])
    x, w = node.inputs
    if node.op == "conv2d":
        return Gemm(x, w, c, pixels, kernel[3], kernel[2])
    if node.op == "conv2d_input_grad":
        return Gemm(x, w, c, pixels, kernel[2], kernel[3], transpose_b=True)
    return Gemm(x, w, c, kernel[2], kernel[3], pixels, transpose_a=True)
