"""How much each channel around a weight carries on the user's data: mean squares, by the reference.

For schemes that choose channels by activation. The model runs unfused and unscheduled, on a few
batches: what is measured does not depend on the target.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pocktvm.autodiff.differentiate import predict_graph
from pocktvm.ir.graph import Graph, Node
from pocktvm.ir.model import Input, Model
from pocktvm.reference import evaluate

BATCHES = 4


def measure_activity(
    model: Model, samples: Mapping[str, Any], batches: int = BATCHES
) -> dict[str, dict[str, np.ndarray]]:
    """Weight -> {"in", "out"} -> mean square of each channel.

    `samples` are checked arrays by input name (pocktvm/data.py), axis 0 samples, at least one
    batch of them.
    """
    graph = predict_graph(model, list(model.parameters))
    readers = [n for n in graph.nodes if n.op in ("conv2d", "matmul")]
    sums: dict[str, dict[str, np.ndarray]] = {}
    specs = list(model.inputs.values())
    size = specs[0].shape[0]
    count = min(batches, len(samples[specs[0].name]) // size)
    for start in range(0, count * size, size):
        batch = {s.name: as_read(samples[s.name][start : start + size], s) for s in specs}
        values = evaluate(graph, batch).values
        for node in readers:
            name = _weight(graph, node)
            if name is not None:
                found = sums.setdefault(name, {"in": np.zeros(1), "out": np.zeros(1)})
                found["in"] = found["in"] + _squares(values[node.inputs[0]], node, True)
                found["out"] = found["out"] + _squares(values[node.outputs[0]], node, False)
    return sums


def as_read(array: Any, spec: Input) -> np.ndarray:
    """A batch as the device's kernels see it: uint8 images normalised, channels first."""
    array = np.asarray(array)
    if array.dtype != np.uint8 or spec.dtype != "float32":
        return array.astype(spec.dtype)
    if array.shape[1:] != spec.shape[1:]:
        array = array.transpose(0, 3, 1, 2)
    image = array.astype(np.float32)
    if not spec.mean:
        return image
    shape = (-1, *(1 for _ in spec.shape[2:]))
    mean, scale = (np.asarray(v, np.float32).reshape(shape) for v in (spec.mean, spec.scale))
    return (image - mean) * scale


def _weight(graph: Graph, node: Node) -> str | None:
    """The parameter a product reads, through a view or a transpose."""
    name, makers = node.inputs[1], graph.producers()
    while (maker := makers.get(name)) is not None and maker.op in ("reshape", "permute_dims"):
        name = maker.inputs[0]
    return name if name in graph.params else None


def _squares(value: np.ndarray, node: Node, is_input: bool) -> np.ndarray:
    axis = 1
    if node.op == "matmul":
        axis = value.ndim - (2 if is_input and node.attrs.get("transpose_a") else 1)
    others = tuple(i for i in range(value.ndim) if i != axis)
    return np.square(value.astype(np.float64)).mean(axis=others)
