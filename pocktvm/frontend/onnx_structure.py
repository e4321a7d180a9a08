"""What a scheme needs to know of an ONNX graph: parameters, blocks, classifier, shifts, bounds.

An ONNX file has no modules; the names of its initializers, which torch's exporters keep, stand in
for them: `blocks.3.mlp.fc1.weight` belongs to the layer `blocks.3.mlp.fc1` of the block `blocks.3`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

# Operator -> first of its inputs that are settings or statistics, never weights.
SETTINGS = {
    "BatchNormalization": 3, "Clip": 1, "Pad": 1, "Resize": 1, "Upsample": 1, "Dropout": 1,
    "Pow": 1, "Range": 0, "OneHot": 1, "QuantizeLinear": 1, "DequantizeLinear": 1,
}  # fmt: skip
# Names exporters make up, as opposed to those of the model.
GENERATED = re.compile(r"^/|::|^_|^val_\d+$|^\d+$|(^|_)[Cc]onst(ant)?(_|$)")
CARRIES_INDICES = frozenset(
    "Cast Reshape Unsqueeze Squeeze Slice Transpose Flatten Identity Expand Clip".split()
)
FLOATS = "float32", "float64", "float16", "bfloat16"


def choose_parameters(graph: Any, stored: Mapping[str, np.ndarray]) -> list[str]:
    """Names of the initializers that may learn, in the file's order.

    Float tensors used as an operand; not settings (Clip's bounds, BN statistics), lone numbers
    with a made-up name, or masks (they hold infinities).
    """
    used: set[str] = set()
    for node in graph.node:
        used.update(name for name in node.input[: SETTINGS.get(node.op_type, len(node.input))])
    return [name for name, a in stored.items() if name in used and _may_learn(name, a)]


def _may_learn(name: str, array: np.ndarray) -> bool:
    if str(array.dtype) not in FLOATS or array.size == 0:
        return False
    lone = array.size == 1 and GENERATED.search(name) is not None
    return not lone and not np.isinf(array).any()


def is_generated(name: str) -> bool:
    """Whether an exporter made the name up (`onnx::MatMul_12`): no pattern is likely to find it."""
    return GENERATED.search(name) is not None


def find_blocks(nodes: Sequence[Any], parameters: Iterable[str]) -> tuple[str, ...]:
    """The longest run of composite numbered prefixes (`blocks.0`, …), in forward order.

    Composite: something stands between the number and the tensor, as in `blocks.0.fc.weight`. Of
    runs of equal length the outermost is taken.
    """
    found: dict[str, list[str]] = {}
    for name in _in_forward_order(nodes, set(parameters)):
        words = name.split(".")
        for i, word in enumerate(words[:-2]):
            if word.isdecimal():
                children = found.setdefault(".".join(words[:i]), [])
                child = ".".join(words[: i + 1])
                children += [child] if child not in children else []
    best: list[str] = []
    for _, children in sorted(found.items(), key=lambda item: item[0].count(".")):
        best = children if len(children) > len(best) else best
    return tuple(best)


def _in_forward_order(nodes: Sequence[Any], parameters: set[str]) -> list[str]:
    return list(dict.fromkeys(n for node in nodes for n in node.input if n in parameters))


def find_classifier(
    nodes: Sequence[Any], parameters: Mapping[str, np.ndarray], blocks: Sequence[str]
) -> tuple[str, ...]:
    """Names of the matrices and their biases behind the last block; without blocks, of the last.

    Names of tensors are prefixes as well as layers' are, and exact where names have no layers.
    """
    inside = f"{blocks[-1]}." if blocks else None
    chosen: list[str] = []
    for i in reversed(range(len(nodes))):
        own = [n for n in nodes[i].input if n in parameters]
        if inside and any(n.startswith(inside) for n in own):
            break
        matrix = _matrix_of(nodes[i], nodes, parameters)
        if matrix is None:
            continue
        chosen += [n for n in (matrix, *_biases_of(nodes, i, parameters)) if n not in chosen]
        if not blocks:
            break
    return tuple(chosen)


def _matrix_of(node: Any, nodes: Sequence[Any], parameters: Mapping[str, np.ndarray]) -> str | None:
    """The parameter a product multiplies by, as it is or transposed."""
    if node.op_type not in ("Gemm", "MatMul"):
        return None
    turned = {n.output[0]: n.input[0] for n in nodes if n.op_type in ("Transpose", "Identity")}
    for name in node.input[:2]:
        name = turned.get(name, name)
        if name in parameters and parameters[name].ndim == 2:
            return name
    return None


def _biases_of(nodes: Sequence[Any], at: int, parameters: Mapping[str, np.ndarray]) -> list[str]:
    """The third operand of a Gemm, or what the Add behind the product adds."""
    if len(nodes[at].input) > 2:
        return [n for n in nodes[at].input[2:] if n in parameters]
    result = nodes[at].output[0]
    readers = [n for n in nodes if n.op_type == "Add" and result in n.input]
    return [n for reader in readers[:1] for n in reader.input if n in parameters]


def find_shifts(nodes: Sequence[Any], parameters: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Convolution weight -> bias of the batch norm that reads the convolution."""
    convs = {n.output[0]: n.input[1] for n in nodes if n.op_type == "Conv"}
    return {
        convs[n.input[0]]: n.input[2]
        for n in nodes
        if n.op_type == "BatchNormalization"
        and convs.get(n.input[0]) in parameters
        and n.input[2] in parameters
    }


def find_bounds(
    nodes: Sequence[Any], inputs: Iterable[str], tables: Mapping[str, np.ndarray]
) -> dict[str, int]:
    """Input of ids -> the number of rows they may name."""
    origin = {name: name for name in inputs}
    bounds: dict[str, int] = {}
    for node in nodes:
        first = node.input[0] if node.input else ""
        if node.op_type in CARRIES_INDICES and first in origin:
            origin[node.output[0]] = origin[first]
        if node.op_type != "Gather" or first not in tables or node.input[1] not in origin:
            continue
        axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
        source, rows = origin[node.input[1]], tables[first].shape[axis]
        bounds[source] = min(rows, bounds.get(source, rows))
    return bounds


def layer_of(node: Any, parameters: Mapping[str, Any]) -> str:
    """The layer a node belongs to: that of its parameters, or the one its name tells.

    torch names nodes by their modules, `/blocks/blocks.1/mlp/fc1/MatMul`: the path of each module
    is given from its parent's list on.
    """
    own = [n for n in node.input if n in parameters and "." in n]
    if own:
        return own[0].rpartition(".")[0]
    path: list[str] = []
    for word in node.name.split("/")[1:-1]:
        if path and word.startswith(path[-1] + "."):
            path.pop()
        path.append(word)
    return ".".join(path)
