"""An ONNX file becomes a Model, node by node.

Our converters (onnx_converters.py) come first, TVM's serve the rest. TVM's own loop over the graph
is not used: it prints, stops at the first unsupported operator, and does not say which Relax
variable comes from which node. Initializers are the parameters (onnx_structure.py says which);
everything that depends on neither them nor an input is folded first (onnx_file.py).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pocktvm.errors import PockError
from pocktvm.frontend import onnx_structure as structure
from pocktvm.frontend.onnx_converters import CONVERTERS, Site
from pocktvm.frontend.onnx_file import OnnxGraph, read_onnx, require_onnx
from pocktvm.ir.model import Input, Model, Parameter
from pocktvm.tvm_api import onnx_converters, relax

LISTED = 18  # operators in one message
OPAQUE = ("relax.call_tir", "relax.call_tir_inplace", "relax.call_packed", "relax.call_dps_packed")


def import_onnx(
    path: str | Path,
    *,
    name: str = "model",
    batch: int | None = None,
    mean: Sequence[float] = (),
    scale: Sequence[float] = (),
) -> Model:
    """Import an ONNX file; `batch` fills a dynamic first dimension of its inputs.

    `mean` and `scale`, per channel, tell the device how to read uint8 samples of image inputs.
    Raises PockError when onnx is not installed, the file is damaged, its opset too new, a
    dimension beside the batch open, it has several outputs, or operators cannot be imported (all
    of them listed).
    """
    graph = read_onnx(Path(path), batch)
    _check_supported(graph)
    module, variables, layers = _translate(graph)
    output = [int(d) for d in module["main"].ret_ty.shape.values]
    blocks = structure.find_blocks(graph.nodes, graph.parameters)
    tables = {**graph.parameters, **graph.constants}
    bounds = structure.find_bounds(graph.nodes, graph.inputs, tables)
    return Model(
        name=name,
        module=module,
        inputs={
            variables[n].name: _input(variables[n].name, shape, dtype, bounds.get(n), mean, scale)
            for n, (shape, dtype) in graph.inputs.items()
        },
        parameters={n: Parameter(n, value) for n, value in graph.parameters.items()},
        output_shape=tuple(output),
        blocks=blocks,
        classifier=structure.find_classifier(graph.nodes, graph.parameters, blocks),
        shifts=structure.find_shifts(graph.nodes, graph.parameters),
        layers=layers,
        notices=tuple(_notices(graph)),
    )


def _input(
    name: str, shape: tuple[int, ...], dtype: str, bound: int | None,
    mean: Sequence[float], scale: Sequence[float],
) -> Input:  # fmt: skip
    image = dtype == "float32" and len(shape) == 4
    return Input(
        name=name,
        shape=shape,
        dtype="float32" if dtype == "float32" else "int32",
        bound=bound,
        mean=tuple(mean) if image else (),
        scale=tuple(scale) if image else (),
    )


def _translate(graph: OnnxGraph) -> tuple[Any, dict[str, Any], dict[str, str]]:
    """(module, variable of each input and parameter, Relax variable -> layer)."""
    types = {n: (list(s), d) for n, (s, d) in graph.inputs.items()}
    variables = {n: relax.Var(_identifier(n), relax.TensorType(*t)) for n, t in types.items()}
    variables |= {
        n: relax.Var(n, relax.TensorType(list(a.shape), "float32"))
        for n, a in graph.parameters.items()
    }
    builder = relax.BlockBuilder()
    with builder.function("main", list(variables.values())):
        with builder.dataflow():
            walk = _Walk(graph, builder, dict(variables))
            walk.run()
            result = builder.emit_output(walk.value(graph.output))
        builder.emit_func_output(result)
    module = relax.transform.DeadCodeElimination(["main"])(builder.get())
    dtype = module["main"].ret_ty.dtype
    if str(getattr(dtype, "dtype", dtype)) != "float32":
        raise PockError(f"the output '{graph.output}' is {dtype}; a step needs float32 outputs.")
    return module, variables, walk.layers


def _identifier(name: str) -> str:
    """An input's name as the artifact can use it."""
    return re.sub(r"\W", "_", name) or "x"


class _Walk:
    """Converts the nodes in order; `env` holds the Relax value of every name seen so far."""

    def __init__(self, graph: OnnxGraph, builder: Any, env: dict[str, Any]) -> None:
        self.graph, self.builder, self.env = graph, builder, env
        self.layers: dict[str, str] = {}
        self.opaque: list[Any] = []
        self.emitted: list[Any] = []
        self.emit = builder.emit
        builder.emit = self._recording

    def run(self) -> None:
        """All nodes; PockError lists those that became opaque kernels."""
        for node in self.graph.nodes:
            self.emitted.clear()
            layer = structure.layer_of(node, self.graph.parameters)
            results = self._convert(node)
            self.layers.update((var.name, layer) for var in self.emitted if layer)
            outputs = [name for name in node.output if name]
            self.env.update(zip(outputs, results, strict=False))
        if self.opaque:
            raise PockError(_unsupported(self.opaque))

    def value(self, name: str) -> Any:
        """The Relax value of a name; constants are made where they are used."""
        if name not in self.env:
            if name not in self.graph.constants:
                raise PockError(
                    f"'{name}' is read but never computed: converting its node left it out (indices"
                    " of MaxPool, statistics of a norm).\n  Export the model without it."
                )
            self.env[name] = relax.const(self.graph.constants[name])
        return self.env[name]

    def _recording(self, expr: Any, name_hint: str = "") -> Any:
        var = self.emit(expr, name_hint)
        self.emitted.append(var)
        if getattr(getattr(expr, "op", None), "name", "") in OPAQUE:
            self.opaque.append(self.node)
        return var

    def _convert(self, node: Any) -> list[Any]:
        self.node = node
        inputs = [self.value(name) if name else None for name in node.input]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = self._call(node, inputs)
            results = result if isinstance(result, tuple | relax.Tuple) else (result,)
            return [self._bound(r) for r in results]
        except PockError:
            raise
        except Exception as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            raise PockError(
                f"cannot import {_shown(node)}: {type(error).__name__}: "
                f"{lines[-1][:300] if lines else ''}\n  Export the layer with other operators."
            ) from error

    def _call(self, node: Any, inputs: list[Any]) -> Any:
        helper = require_onnx().helper
        attrs = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        attrs = {k: tuple(v) if isinstance(v, list) else v for k, v in attrs.items()}
        ours = CONVERTERS.get(node.op_type)
        if ours is not None and not _contributed(node):
            return ours(Site(self.builder, node.op_type, inputs, attrs, len(node.output)))
        table, operands = onnx_converters()
        attrs["tvm_custom"] = {"name": node.name, "num_outputs": len(node.output)}
        convert = table[node.op_type].get_converter(1 if _contributed(node) else self.graph.opset)
        return convert(self.builder, operands(inputs), attrs, [self.env, {}])

    def _bound(self, expr: Any) -> Any:
        """A variable for what a converter returned, its parts recorded on the way."""
        if isinstance(expr, relax.Var) or not isinstance(expr, relax.Expr):
            return expr
        if isinstance(expr, relax.Call | relax.TupleGetItem):
            return self.builder.emit(expr)
        return expr


# Messages --------------------------------------------------------------------------------------


def _contributed(node: Any) -> bool:
    """An operator of Microsoft's runtime; TVM reads a few of them."""
    return node.domain == "com.microsoft"


def _check_supported(graph: OnnxGraph) -> None:
    table, _ = onnx_converters()
    known = {"": set(CONVERTERS) | set(table), "com.microsoft": {"Gelu", "FastGelu", "BiasGelu"}}
    known["ai.onnx"] = known[""]
    missing = [n for n in graph.nodes if n.op_type not in known.get(n.domain, ())]
    if missing:
        raise PockError(_unsupported(missing))


def _unsupported(nodes: Sequence[Any]) -> str:
    places: dict[str, list[str]] = {}
    for node in nodes:
        operator = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        seen = places.setdefault(operator, [])
        seen += [node.name or node.output[0]] if (node.name or node.output[0]) not in seen else []
    lines = [
        f"  {op}  ('{where[0]}'{f' and {len(where) - 1} more' if where[1:] else ''})"
        for op, where in places.items()
    ]
    if len(lines) > LISTED:
        lines = lines[:LISTED] + [f"  … and {len(lines) - LISTED} more"]
    count = "an operator" if len(places) == 1 else f"{len(places)} operators"
    return "\n".join(
        [
            f"the ONNX model uses {count} that cannot be imported:",
            *lines,
            "  Export these layers with other operators, or give the PyTorch model itself: "
            "path/file.py:function.",
        ]
    )


def _shown(node: Any) -> str:
    return f"'{node.op_type}' (node '{node.name or node.output[0]}')"


def _notices(graph: OnnxGraph) -> list[str]:
    lines = []
    trains = {n.op_type for n in graph.nodes if _training_flag(n, graph.constants)}
    if "BatchNormalization" in trains:
        lines.append("batch norms in training mode use their stored statistics, and keep them")
    if "Dropout" in trains:
        lines.append("dropout is left out")
    made_up = [n for n in graph.parameters if structure.is_generated(n)]
    if made_up:
        lines.append(
            f"{len(made_up)} of {len(graph.parameters)} weights have a made-up name "
            f"('{made_up[0]}'): patterns of a scheme find them by it alone. "
            "torch.onnx.export(…, do_constant_folding=False) keeps the model's names"
        )
    return lines


def _training_flag(node: Any, constants: Mapping[str, Any]) -> bool:
    if node.op_type == "BatchNormalization":
        return any(a.name == "training_mode" and a.i for a in node.attribute)
    if node.op_type == "Dropout" and len(node.input) > 2:
        return bool(constants.get(node.input[2], False))
    return False
