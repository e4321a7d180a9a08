"""Small ONNX models built by hand, each with the same network as a torch function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.nn import functional as F

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


@dataclass(frozen=True)
class Case:
    """`forward(p, x)` computes in torch what `proto` says; `p` are the tensors that may learn."""

    proto: onnx.ModelProto
    forward: Callable[[dict[str, torch.Tensor], torch.Tensor], torch.Tensor]
    x: np.ndarray
    classes: int


def model(nodes, inputs, outputs, stored, opset=18, rank=2) -> onnx.ModelProto:
    """A model from nodes, (name, dtype, shape) of inputs, names of outputs, arrays by name."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(*given) for given in inputs],
        [helper.make_tensor_value_info(name, FLOAT, [None] * rank) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in stored.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def node(op, inputs, output, **attrs) -> onnx.NodeProto:
    """A node with one output, named after it."""
    return helper.make_node(op, inputs.split(), output.split(), name=output.split()[0], **attrs)


def _weights(seed: int, **shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        name.replace("__", "."): (0.4 * rng.standard_normal(shape)).astype("float32")
        for name, shape in shapes.items()
    }


def mlp(batch="n") -> Case:
    """Gemm, Relu, Gemm; the batch is open."""
    stored = _weights(0, fc1__weight=(8, 6), fc1__bias=(8,), fc2__weight=(8, 3), fc2__bias=(3,))
    nodes = [
        node("Gemm", "x fc1.weight fc1.bias", "h", transB=1),
        node("Relu", "h", "r"),
        node("Gemm", "r fc2.weight fc2.bias", "out", alpha=0.5, beta=2.0),
    ]

    def forward(p, x):
        h = F.relu(F.linear(x, p["fc1.weight"], p["fc1.bias"]))
        return 0.5 * (h @ p["fc2.weight"]) + 2 * p["fc2.bias"]

    x = np.random.default_rng(1).standard_normal((4, 6)).astype("float32")
    return Case(model(nodes, [("x", FLOAT, [batch, 6])], ["out"], stored), forward, x, 3)


def cnn() -> Case:
    """Two conv-BN blocks (relu6 as Clip, a depthwise convolution), pooling, a Gemm."""
    stored = _weights(
        2, blocks__0__conv__weight=(4, 3, 3, 3), blocks__0__bn__weight=(4,),
        blocks__0__bn__bias=(4,), blocks__1__conv__weight=(4, 1, 3, 3),
        blocks__1__conv__bias=(4,), blocks__1__bn__weight=(4,), blocks__1__bn__bias=(4,),
        head__fc__weight=(3, 4), head__fc__bias=(3,),
    )  # fmt: skip
    rng = np.random.default_rng(3)
    for i in (0, 1):
        stored[f"blocks.{i}.bn.running_mean"] = rng.standard_normal(4).astype("float32") / 4
        stored[f"blocks.{i}.bn.running_var"] = rng.uniform(0.5, 2, 4).astype("float32")
    stored |= {"low": np.float32(0), "high": np.float32(6)}
    second = {"auto_pad": "SAME_UPPER", "strides": [2, 2], "group": 4}
    bn = " ".join(f"blocks.{{0}}.bn.{s}" for s in "weight bias running_mean running_var".split())
    nodes = [
        node("Conv", "x blocks.0.conv.weight", "c0", pads=[1, 1, 1, 1]),
        node("BatchNormalization", "c0 " + bn.format(0), "b0"),
        node("Clip", "b0 low high", "a0"),
        node("MaxPool", "a0", "p0", kernel_shape=[2, 2], strides=[2, 2]),
        node("Conv", "p0 blocks.1.conv.weight blocks.1.conv.bias", "c1", **second),
        node("BatchNormalization", "c1 " + bn.format(1), "b1", epsilon=1e-3),
        node("Relu", "b1", "a1"),
        node("GlobalAveragePool", "a1", "g"),
        node("Flatten", "g", "f"),
        node("Gemm", "f head.fc.weight head.fc.bias", "logits", transB=1),
    ]

    def norm(p, x, i, eps):
        mean, var = (
            torch.from_numpy(stored[f"blocks.{i}.bn.running_{s}"]) for s in ("mean", "var")
        )
        gain, shift = p[f"blocks.{i}.bn.weight"], p[f"blocks.{i}.bn.bias"]
        return F.batch_norm(x, mean, var, gain, shift, False, 0.1, eps)

    def forward(p, x):
        x = F.conv2d(x, p["blocks.0.conv.weight"], padding=1)
        x = F.max_pool2d(F.relu6(norm(p, x, 0, 1e-5)), 2)
        x = F.pad(x, (0, 1, 0, 1))  # SAME_UPPER: the odd element goes to the end
        x = F.conv2d(x, p["blocks.1.conv.weight"], p["blocks.1.conv.bias"], 2, groups=4)
        x = F.relu(norm(p, x, 1, 1e-3)).mean((2, 3))
        return F.linear(x, p["head.fc.weight"], p["head.fc.bias"])

    x = rng.standard_normal((2, 3, 8, 8)).astype("float32")
    return Case(model(nodes, [("x", FLOAT, [2, 3, 8, 8])], ["logits"], stored), forward, x, 3)


def block() -> Case:
    """An embedding and one attention block as exporters spell it: shapes computed from shapes,
    GELU by Erf, a LayerNorm, weights without torch's names."""
    stored = _weights(
        4, table=(11, 8), ln__weight=(8,), ln__bias=(8,), qkv=(8, 24), qkv__bias=(24,),
        fc1=(8, 12), fc1__bias=(12,), fc2=(12, 8), fc2__bias=(8,), head=(8, 5), head__bias=(5,),
    )  # fmt: skip
    stored["onnx::MatMul_9"] = stored.pop("qkv")
    stored |= {
        "zero": np.array(0), "one": np.array(1), "axis0": np.array([0]),
        "tail": np.array([5, 8]), "mean_axes": np.array([1]),
    }  # fmt: skip
    for name, value in (("root", 8**0.5), ("sqrt2", 2**0.5), ("half", 0.5), ("unit", 1.0)):
        stored[f"/Constant_{name}"] = np.float32(value)
    nodes = [
        node("Gather", "table ids", "e"),
        node("LayerNormalization", "e ln.weight ln.bias", "n", epsilon=1e-5),
        node("MatMul", "n onnx::MatMul_9", "m"),
        node("Add", "qkv.bias m", "qkv"),
        node("Split", "qkv", "q k v", axis=2, num_outputs=3),
        node("Transpose", "k", "kt", perm=[0, 2, 1]),
        node("MatMul", "q kt", "s"),
        node("Div", "s /Constant_root", "scaled"),
        node("Softmax", "scaled", "w", axis=-1),
        node("MatMul", "w v", "o"),
        node("Shape", "ids", "shape"),
        node("Gather", "shape zero", "batch"),
        node("Unsqueeze", "batch axis0", "batch1"),
        node("Concat", "batch1 tail", "target", axis=0),
        node("Reshape", "o target", "view"),
        node("Add", "e view", "r"),
        node("MatMul", "r fc1", "f"),
        node("Add", "f fc1.bias", "h"),
        node("Div", "h /Constant_sqrt2", "hs"),
        node("Erf", "hs", "erf"),
        node("Add", "erf /Constant_unit", "erf1"),
        node("Mul", "h erf1", "g2"),
        node("Mul", "g2 /Constant_half", "g"),
        node("MatMul", "g fc2", "f2"),
        node("Add", "f2 fc2.bias", "h2"),
        node("Sum", "r h2 e", "sum"),
        node("ReduceMean", "sum mean_axes", "pooled", keepdims=0),
        node("Gemm", "pooled head head.bias", "logits"),
    ]

    def forward(p, ids):
        e = p["table"][ids]
        n = F.layer_norm(e, (8,), p["ln.weight"], p["ln.bias"])
        q, k, v = (n @ p["onnx::MatMul_9"] + p["qkv.bias"]).split(8, -1)
        r = e + F.softmax(q @ k.transpose(1, 2) / 8**0.5, -1) @ v
        h = F.gelu(r @ p["fc1"] + p["fc1.bias"]) @ p["fc2"] + p["fc2.bias"]
        return (r + h + e).mean(1) @ p["head"] + p["head.bias"]

    ids = np.random.default_rng(5).integers(0, 11, (3, 5))
    return Case(model(nodes, [("ids", INT64, ["n", 5])], ["logits"], stored), forward, ids, 5)
