"""A step in micro-batches: the same gradients from a part of the batch at a time.

    step(x[8])  →  g = step'(x[0:4]);  g += step'(x[4:8]);  update with g

The program of one part is written down several times, each on its slice of the inputs; gradients
are summed and the optimizer runs once, behind the last part. What the forward pass keeps is that of
one part; what it costs is a buffer for every gradient. Kernels are compiled once for all parts.

The loss stays the mean over the whole batch, for every split: cross-entropy becomes a sum over the
part divided by the weight of all labels that count (parts may hold different numbers of ignored
ones, or nothing else); other means have parts of equal size. Dropout's masks are those of the whole
batch. Right for models whose samples do not meet; levers.py checks it with the reference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pocktvm.autodiff.losses import Loss
from pocktvm.autodiff.to_graph import GraphBuilder
from pocktvm.errors import PockError
from pocktvm.ir.graph import Node

SUMS = ("cross_entropy", "cross_entropy_grad")


def unroll(
    part: GraphBuilder, loss_name: str, gradients: Sequence[str], count: int, loss: Loss
) -> tuple[GraphBuilder, str, list[str]]:
    """(a builder with the whole batch's program, its loss, its gradients) from one part's.

    PockError for a loss that the module computes itself: how its parts add up is not known.
    """
    if loss.name == "none":
        raise PockError("loss 'none' is computed by the module: it cannot be cut into parts.")
    whole = _sources(part, count)
    share = _share(whole, count, loss)
    nodes = _needed(part.nodes, {loss_name, *gradients})
    total, sums = "", [""] * len(gradients)
    for number in range(count):
        names = _copy(part, whole, nodes, number, count, share if _weighted(loss) else None)
        total = _added(whole, total, names.get(loss_name, loss_name), loss_name)
        sums = [_added(whole, s, names.get(g, g), g) for s, g in zip(sums, gradients, strict=True)]
    total = whole.node("multiply", total, share, name=f"{loss_name}:mean")
    if not _weighted(loss) and share != whole.const(np.float32(1.0)):
        sums = [whole.node("multiply", s, share, role="gradient", name=f"{s}:mean") for s in sums]
    return whole, total, sums


def _weighted(loss: Loss) -> bool:
    return loss.name == "cross_entropy"


def _sources(part: GraphBuilder, count: int) -> GraphBuilder:
    """The part's parameters, constants and scalars, and inputs `count` times as long."""
    whole = GraphBuilder(part.name)
    whole.params, whole.consts = dict(part.params), dict(part.consts)
    whole.scalars = dict(part.scalars)
    for name in (*whole.params, *whole.consts, *whole.scalars):
        whole.values[name] = part.values[name]
    for name in part.inputs:
        first, *rest = part.values[name].shape
        whole.input(name, (count * first, *rest), part.values[name].dtype)
    return whole


def _share(whole: GraphBuilder, count: int, loss: Loss) -> str:
    """What a part's loss is multiplied by: 1 / (weight of all labels) behind a sum, else 1 / parts
    (1 for a loss that is a sum itself)."""
    if not _weighted(loss):
        summed = loss.name == "kl_div" and loss.options["reduction"] == "sum"
        return whole.const(np.float32(1.0 if summed else 1.0 / count))
    y, shape = "y", whole.values["y"].shape
    ignored = whole.const(np.int32(loss.options["ignore_index"]))
    counts = whole.node("not_equal", y, ignored, dtype="bool", layer="loss")
    weight = whole.define("loss:astype", shape)
    whole.nodes.append(Node("astype", (counts,), (weight,), {"dtype": "float32"}, "loss"))
    if loss.options["weight"] is not None:
        table = whole.const(np.asarray(loss.options["weight"], np.float32))
        each = whole.node("take", table, y, shape=shape, layer="loss", axis=0, mode="clip")
        weight = whole.node("multiply", each, weight, layer="loss")
    axes = tuple(range(len(shape)))
    if axes:
        weight = whole.node("sum", weight, shape=(), layer="loss", axes=axes, keepdims=False)
    return whole.node("divide", whole.const(np.float32(1.0)), weight, layer="loss")


def _needed(nodes: Sequence[Node], results: set[str]) -> list[Node]:
    kept: list[Node] = []
    needed = set(results)
    for node in reversed(nodes):
        if needed & set(node.outputs):
            kept.append(node)
            needed |= set(node.inputs)
    return kept[::-1]


def _copy(
    part: GraphBuilder, whole: GraphBuilder, nodes: Sequence[Node], number: int, count: int,
    share: str | None,
) -> dict[str, str]:  # fmt: skip
    """Append part `number`; its names of the part's values."""
    names: dict[str, str] = {}
    for name in part.inputs:
        names[name] = _slice(whole, name, part.values[name].shape, number)
    for node in nodes:
        for out in node.outputs:
            value = part.values[out]
            names[out] = whole.define(f"{out}#{number}", value.shape, value.dtype, value.role)
        inputs = [names.get(i, i) for i in node.inputs]
        attrs: Mapping[str, Any] = node.attrs
        if share is not None and node.op in SUMS and node.layer == "loss":
            attrs = {**attrs, "reduction": "sum"}
            if node.op == "cross_entropy_grad":
                inputs[2] = share
        if node.op == "dropout":
            size = math.prod(part.values[node.outputs[0]].shape)
            attrs = {**attrs, "start": number * size}
        outs = tuple(names[o] for o in node.outputs)
        whole.nodes.append(Node(node.op, tuple(inputs), outs, attrs, node.layer))
    return names


def _slice(whole: GraphBuilder, name: str, shape: tuple[int, ...], number: int) -> str:
    value = whole.values[name]
    begin = (number * shape[0], *[0] * (len(shape) - 1))
    end = (begin[0] + shape[0], *shape[1:])
    attrs: dict[str, Any] = {"begin": begin, "end": end, "strides": (1,) * len(shape)}
    return whole.node(
        "strided_slice", name, shape=shape, dtype=value.dtype, name=f"{name}#{number}", **attrs
    )


def _added(whole: GraphBuilder, total: str, new: str, name: str) -> str:
    if not total:
        return new
    role = whole.values[new].role
    return whole.node("add", total, new, role=role, name=f"{name}:sum")
