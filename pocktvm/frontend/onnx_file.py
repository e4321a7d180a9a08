"""An ONNX file read, checked, made static, and folded, before anything of TVM sees it.

    bytes ── load ── checker ── inline functions ── fix the batch ── fold constants ── OnnxGraph

Folding computes, with onnx's own reference, every node that depends on no input and no parameter:
what exporters spell as Shape, Gather, Concat in front of a Reshape is a constant afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from pocktvm.errors import PockError
from pocktvm.frontend.onnx_structure import choose_parameters, is_generated

OLDEST_OPSET, NEWEST_OPSET = 7, 25
DTYPES = {1: "float32", 6: "int32", 7: "int64"}  # of inputs, by TensorProto's number
STATIC_SHAPE = ("Shape", "Size")


@dataclass(frozen=True)
class OnnxGraph:
    """A checked ONNX graph of static shapes.

    `nodes` are NodeProtos in forward order; `inputs` name -> (shape, dtype); `parameters` are
    the float tensors that may learn; `constants` everything else that is known.
    """

    nodes: tuple[Any, ...]
    opset: int
    inputs: Mapping[str, tuple[tuple[int, ...], str]]
    output: str
    parameters: Mapping[str, np.ndarray]
    constants: Mapping[str, np.ndarray]


def require_onnx() -> Any:
    """The onnx package, or PockError with the command that installs it."""
    try:
        for part in ("checker", "inliner", "numpy_helper", "reference", "shape_inference"):
            import_module(f"onnx.{part}")
        return import_module("onnx")
    except ImportError as error:
        raise PockError(
            f"reading an .onnx file needs the package onnx ({error}).\n"
            "  Install it: pip install onnx"
        ) from error


def input_shapes(path: Path, batch: int | None) -> tuple[dict[str, tuple[int, ...]], bool]:
    """(input name -> static shape, whether the file leaves the batch open)."""
    proto = _load(path, weights=False)
    open_batch = any(not d.dim_value for _, dims in _dims(proto) for d in dims[:1])
    _fix_shapes(proto, path, batch)
    return {n: tuple(d.dim_value for d in dims) for n, dims in _dims(proto)}, open_batch


def read_onnx(path: Path, batch: int | None) -> OnnxGraph:
    """Read a file for a batch (None: the file's own). Raises PockError for what cannot be read."""
    onnx = require_onnx()
    proto = _load(path, weights=True)
    opset = _opset(proto, path)
    if proto.functions:
        proto = onnx.inliner.inline_local_functions(proto)
    _check(proto, path)
    _fix_shapes(proto, path, batch)
    output = _only_output(proto, path)
    known = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    _separate(proto.graph, known)
    parameters = {n: known.pop(n) for n in choose_parameters(proto.graph, known)}
    _check_parameters(parameters)
    _fold(proto, known, opset)
    return OnnxGraph(
        nodes=tuple(proto.graph.node),
        opset=opset,
        inputs={n: (tuple(d.dim_value for d in dims), dt) for n, dims, dt in _inputs(proto, path)},
        output=output,
        parameters={n: np.ascontiguousarray(a, "float32") for n, a in parameters.items()},
        constants=known,
    )


def _load(path: Path, *, weights: bool) -> Any:
    onnx = require_onnx()
    if not path.is_file():
        raise PockError(f"there is no ONNX file '{path}'.")
    try:
        proto = onnx.load_model(path, load_external_data=weights)
    except FileNotFoundError as error:
        raise PockError(f"'{path}' keeps weights in another file: {error}.") from error
    except Exception as error:  # protobuf's, or the checker's for external data
        raise PockError(_unreadable(path, error)) from error
    if not proto.HasField("graph") or not (proto.graph.node or proto.graph.initializer):
        raise PockError(_unreadable(path, "it holds no graph"))
    return proto


def _unreadable(path: Path, reason: object) -> str:
    text = " ".join(str(reason).split())[:200].rstrip(".")
    return (
        f"'{path}' ({path.stat().st_size} bytes) is not an ONNX model: {text}.\n"
        "  Is the file whole? Export or copy it again, the external data files beside it."
    )


def _check(proto: Any, path: Path) -> None:
    onnx = require_onnx()
    try:
        onnx.checker.check_model(proto)
    except (onnx.checker.ValidationError, ValueError) as error:
        reason = [line for line in str(error).splitlines() if line.strip()][:3]
        raise PockError(f"'{path}' is not a valid ONNX model:\n  " + "\n  ".join(reason)) from error


def _opset(proto: Any, path: Path) -> int:
    versions = [o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")]
    opset = versions[0] if versions else 1
    newest = min(NEWEST_OPSET, require_onnx().defs.onnx_opset_version())
    if not OLDEST_OPSET <= opset <= newest:
        raise PockError(
            f"'{path}' uses opset {opset}; {OLDEST_OPSET} to {newest} are read.\n"
            "  Export it again: torch.onnx.export(…, opset_version=18)"
            + (", or pip install -U onnx." if newest < opset <= NEWEST_OPSET else ".")
        )
    return opset


def _only_output(proto: Any, path: Path) -> str:
    outputs = [o.name for o in proto.graph.output]
    if len(outputs) != 1:
        raise PockError(
            f"'{path}' has {len(outputs)} outputs ({', '.join(outputs[:6])}); a step needs one.\n"
            "  Export a module that returns the logits alone, or cut the file: "
            f"onnx.utils.extract_model(in, out, inputs, ['{outputs[0] if outputs else 'logits'}'])."
        )
    if proto.graph.output[0].type.tensor_type.elem_type not in (0, 1):
        raise PockError(f"'{path}' returns '{outputs[0]}', which is not float32.")
    return outputs[0]


def _check_parameters(parameters: Mapping[str, np.ndarray]) -> None:
    for name, array in parameters.items():
        if str(array.dtype) != "float32":
            raise PockError(
                f"the weight '{name}' is {array.dtype}; a step trains float32.\n"
                "  Export the model in float32 (model.float())."
            )
        if not np.isfinite(array).all():
            raise PockError(f"the parameter '{name}' holds NaN or infinity: mend the weights.")


# Shapes ----------------------------------------------------------------------------------------


def _dims(proto: Any) -> Iterator[tuple[str, Any]]:
    """Inputs proper (old files list the initializers, too) with their dimensions."""
    stored = {t.name for t in proto.graph.initializer}
    for value in proto.graph.input:
        if value.name not in stored:
            yield value.name, value.type.tensor_type.shape.dim


def _inputs(proto: Any, path: Path) -> Iterator[tuple[str, Any, str]]:
    dtypes = {v.name: v.type.tensor_type.elem_type for v in proto.graph.input}
    for name, dims in _dims(proto):
        if dtypes[name] not in DTYPES:
            raise PockError(
                f"the input '{name}' of '{path}' is neither float32 nor an integer of 32 or 64 "
                "bits.\n  Export the model in float32, with casts inside it."
            )
        yield name, dims, DTYPES[dtypes[name]]


def _fix_shapes(proto: Any, path: Path, batch: int | None) -> None:
    """Write the batch into the open first dimensions; refuse any other open one."""
    names = {d.dim_param for _, dims in _dims(proto) for d in dims[:1] if not d.dim_value}
    for name, dims in _dims(proto):
        for axis, dim in enumerate(dims):
            if dim.dim_value:
                continue
            leads = axis == 0 or (dim.dim_param and dim.dim_param in names)
            if not leads:
                raise PockError(
                    f"the input '{name}' of '{path}' has shape {_shown(dims)}: dimension {axis} "
                    "is open, and only the batch may be.\n  Export it with fixed sizes."
                )
            if batch is None:
                raise PockError(
                    f"the input '{name}' of '{path}' has shape {_shown(dims)}: its batch is open."
                    "\n  Choose it: --batch 8."
                )
            dim.dim_value = batch
        if batch is not None and dims and dims[0].dim_value != batch:
            raise PockError(
                f"--batch {batch}: the input '{name}' of '{path}' is fixed to {_shown(dims)}.\n"
                "  Leave --batch out, or export with a dynamic batch (dynamic_axes)."
            )
    del proto.graph.value_info[:]
    for value in proto.graph.output:
        value.type.tensor_type.ClearField("shape")


def _shown(dims: Any) -> str:
    return "[" + ", ".join(str(d.dim_value or d.dim_param or "?") for d in dims) + "]"


def _separate(graph: Any, known: dict[str, np.ndarray]) -> None:
    """Undo the exporter's merging of equal weights, which would tie them in training.

    torch stores one of the layers whose gains are all ones, and an Identity under the name of each
    other one. (Weights that are tied in the model have one name only.)
    """
    kept = []
    for node in graph.node:
        source, name = (node.input[0], node.output[0]) if node.op_type == "Identity" else ("", "")
        if source in known and known[source].dtype.kind == "f" and not is_generated(name):
            known[name] = known[source].copy()
        else:
            kept.append(require_onnx().NodeProto.FromString(node.SerializeToString()))
    del graph.node[:]
    graph.node.extend(kept)


# Constants -------------------------------------------------------------------------------------


def _fold(proto: Any, known: dict[str, np.ndarray], opset: int) -> None:
    """Move what can be computed now from the nodes to `known`, until nothing more can."""
    onnx = require_onnx()
    graph = proto.graph
    while True:
        shapes = _inferred(onnx, proto)
        found: dict[str, np.ndarray] = {}
        left = []
        for node in graph.node:
            values = _computed(node, {**known, **found}, shapes, opset)
            found.update(values or {})
            left += [node] if values is None else []
        known.update(found)
        if not found:
            return
        kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in left]
        del graph.node[:]
        graph.node.extend(kept)
        # shape inference reads the targets of Reshape and the like
        small = {n: a for n, a in found.items() if a.size <= 64 and a.dtype.kind in "iuf"}
        graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in small.items())


def _inferred(onnx: Any, proto: Any) -> dict[str, tuple[int, ...]]:
    """Static shapes of the values, as far as onnx can tell."""
    try:
        graph = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph
    except (onnx.shape_inference.InferenceError, ValueError):
        graph = proto.graph
    shapes = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        tensor = value.type.tensor_type
        if tensor.HasField("shape") and all(d.HasField("dim_value") for d in tensor.shape.dim):
            shapes[value.name] = tuple(d.dim_value for d in tensor.shape.dim)
    return shapes | {t.name: tuple(t.dims) for t in proto.graph.initializer}


def _computed(
    node: Any, known: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], opset: int
) -> dict[str, np.ndarray] | None:
    """The node's outputs when they are known now."""
    onnx = require_onnx()
    inputs = [name for name in node.input if name]
    if node.op_type in STATIC_SHAPE and inputs[0] in shapes and inputs[0] not in known:
        known = {inputs[0]: np.broadcast_to(np.float32(0), shapes[inputs[0]])}
    nested = any(a.type == onnx.AttributeProto.GRAPH for a in node.attribute)
    random = node.op_type.startswith("Random") or node.op_type in ("Bernoulli", "Multinomial")
    if nested or random or node.domain not in ("", "ai.onnx") or not set(inputs) <= set(known):
        return None
    try:
        session = onnx.reference.ReferenceEvaluator(node, opsets={"": opset})
        outputs = session.run(None, {name: known[name] for name in inputs})
    except Exception:  # whatever the reference cannot run stays in the graph
        return None
    return {n: np.asarray(a) for n, a in zip(node.output, outputs, strict=False) if n}
