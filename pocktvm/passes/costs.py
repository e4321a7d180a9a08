"""What a node costs: FLOPs from its operators, seconds by a plain roofline.

Good for comparing nodes of one graph on one device, not for promising milliseconds: rates are those
of profiles on one x86-64 core, as shares of what its two FMA a cycle give. docs/memory.md has what
the roofline says of two steps beside what they take.
"""

from __future__ import annotations

from collections.abc import Mapping

from pocktvm.ir.graph import Node, Value
from pocktvm.ir.target import Target

CLOCK = 1.8e9
DENSE, DEPTHWISE, OTHER = 0.85, 0.2, 0.5  # of a core's two FMA per cycle, by family
BANDWIDTH = 12e9  # bytes per second, all cores together
LAUNCH = 2e-6  # seconds of a call whatever it does
_PER_ELEMENT = {"exp": 20, "tanh": 25, "sigmoid": 22, "erf": 30, "gelu": 35, "gelu_tanh": 35,
                "gelu_grad": 50, "silu": 24, "silu_grad": 30, "softmax": 30, "log_softmax": 30,
                "layer_norm": 10, "rms_norm": 8, "layer_norm_grad": 16, "dropout": 20}  # fmt: skip


def flops(node: Node, values: Mapping[str, Value]) -> int:
    """Operations of a node or of everything in a group, of groups in it too."""
    return sum(flops(part, values) for part in node.body) if node.body else _flops(node, values)


def nbytes(node: Node, values: Mapping[str, Value]) -> int:
    """Bytes that cross the node's border."""
    return sum(values[n].nbytes for n in (*node.inputs, *node.outputs))


def seconds(node: Node, values: Mapping[str, Value], target: Target | None = None) -> float:
    """About how long the node takes."""
    isa = target.isa if target is not None else None
    peak = (isa.lanes * isa.cores if isa else 16) * 4 * CLOCK
    arithmetic = sum(flops(n, values) / _share(n) for n in node.kernel_nodes()) / peak
    return LAUNCH + max(arithmetic, nbytes(node, values) / BANDWIDTH)


def _share(node: Node) -> float:
    """Of the peak, what kernels of this family reach."""
    if node.op == "matmul":
        return DENSE
    if node.op.startswith("conv2d"):
        return DENSE if node.attrs.get("groups", 1) == 1 else DEPTHWISE
    return OTHER


def _flops(node: Node, values: Mapping[str, Value]) -> int:
    out = values[node.outputs[0]]
    if node.op == "matmul":
        a = values[node.inputs[0]]
        depth = a.shape[-2] if node.attrs.get("transpose_a") else a.shape[-1]
        whole = 2 * out.size * depth
        return whole // 2 if node.attrs.get("causal") else whole
    if node.op in ("conv2d", "conv2d_input_grad", "conv2d_weight_grad"):
        small = {"conv2d": out, "conv2d_input_grad": values[node.inputs[0]]}
        dy = small.get(node.op, values[node.inputs[1]])
        weight = out if node.op == "conv2d_weight_grad" else values[node.inputs[1]]
        channels = dy.shape[-1] if node.attrs.get("layout") == "NHWC" else dy.shape[1]
        return 2 * dy.size * weight.size // max(1, channels)
    if node.op == "reshape":
        return 0
    largest = max((values[n].size for n in (*node.inputs, *node.outputs)), default=0)
    return _PER_ELEMENT.get(node.op, 1) * largest
