"""A Relax function of our operators -> `ir.graph.Graph`, plain data.

What Relax's `Gradient` adds by itself (`relax.add` where gradients meet, `relax.ones` for the loss,
`relax.zeros` for unused results) is translated; any other Relax operator becomes a node "relax",
for which the fallback writes a kernel.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pocktvm.autodiff.ops import (
    PREFIX,
    Expr,
    attrs_of,
    dtype_of,
    is_const,
    layer_and_name,
    narrow,
    op_name,
    shape_of,
)
from pocktvm.errors import InternalError
from pocktvm.ir.graph import Graph, Node, Param, Value
from pocktvm.ir.ops import is_elementwise
from pocktvm.tvm_api import relax, tvm


class GraphBuilder:
    """Collects a program; `graph` drops what no result needs."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.values: dict[str, Value] = {}
        self.nodes: list[Node] = []
        self.consts: dict[str, np.ndarray] = {}
        self.params: dict[str, Param] = {}
        self.scalars: dict[str, str] = {}
        self.inputs: list[str] = []

    def define(
        self, name: str, shape: Sequence[int], dtype: str = "float32", role: str = "activation"
    ) -> str:
        """Declare a value; a taken name gets a number."""
        unique, count = name, 1
        while unique in self.values:
            unique, count = f"{name}.{count}", count + 1
        self.values[unique] = Value(unique, tuple(shape), dtype, role)
        return unique

    def input(self, name: str, shape: Sequence[int], dtype: str) -> str:
        """Declare a tensor that the caller gives at every step."""
        self.inputs.append(self.define(name, shape, dtype))
        return name

    def param(self, param: Param) -> str:
        """A trained tensor, an optimizer's state, or a selection."""
        if param.name not in self.params:
            self.params[param.name] = param
            self.define(param.name, param.value.shape, str(param.value.dtype))
        return param.name

    def scalar(self, formula: str, dtype: str = "float32") -> str:
        """A number the runtime computes before each step, once per formula."""
        if formula not in self.scalars:
            self.scalars[self.define(formula, (), dtype)] = formula
        return formula

    def frozen(self, name: str, array: np.ndarray) -> str:
        """A named constant: a tensor that does not learn."""
        array = array.astype(narrow(str(array.dtype)), copy=False)
        self.consts[name] = array
        return self.define(name, array.shape, str(array.dtype))

    def const(self, value: Any) -> str:
        """A constant named after its content, so that programs agree on the names."""
        array = np.asarray(value)
        array = np.ascontiguousarray(array.astype(narrow(str(array.dtype)))).reshape(array.shape)
        if array.ndim == 0:
            name = f"const_{array.item()!r}"
        else:
            head = f"{array.shape}{array.dtype}".encode()
            name = f"const_{hashlib.sha256(head + array.tobytes()).hexdigest()[:12]}"
        if name not in self.consts:
            self.consts[name] = array
            self.define(name, array.shape, str(array.dtype))
        return name

    def node(
        self,
        op: str,
        *inputs: str,
        shape: Sequence[int] | None = None,
        dtype: str = "float32",
        role: str = "activation",
        layer: str = "",
        name: str = "",
        **attrs: Any,
    ) -> str:
        """Append an operator with one result; the shape defaults to the operands' broadcast."""
        if shape is None:
            shape = np.broadcast_shapes(*(self.values[i].shape for i in inputs))
        out = self.define(name or (f"{layer}:{op}" if layer else op), shape, dtype, role)
        self.nodes.append(Node(op, inputs, (out,), attrs, layer))
        return out

    def graph(self, outputs: Mapping[str, str], updates: Mapping[str, str]) -> Graph:
        """The program of these results, without dead nodes, constants and parameters."""
        live = {*outputs.values(), *updates.values()}
        kept: list[Node] = []
        for node in reversed(self.nodes):
            if live.intersection(node.outputs):
                kept.append(node)
                live.update(node.inputs)
        live.update(self.inputs, *(n.outputs for n in kept))
        live.update(name for name in self.params if name in updates)
        return Graph(
            name=self.name,
            values={n: v for n, v in self.values.items() if n in live},
            nodes=tuple(reversed(kept)),
            inputs=tuple(self.inputs),
            outputs=dict(outputs),
            scalars={n: f for n, f in self.scalars.items() if n in live},
            params={n: p for n, p in self.params.items() if n in live},
            consts={n: a for n, a in self.consts.items() if n in live},
            updates=dict(updates),
        ).check()


class Converter:
    """Walks a Relax function's bindings into a GraphBuilder; `env` maps variables to value names
    (a tuple of names for a variable that holds a tuple)."""

    def __init__(self, builder: GraphBuilder, env: Mapping[Any, Any]) -> None:
        self.builder = builder
        self.env = dict(env)
        self.role = "activation"
        self.producers: dict[str, Node] = {}

    def run(self, function: Any, forward_end: Any = None) -> Any:
        """Convert every binding; returns the names of what the function returns. Values behind
        the one named `forward_end` are gradients."""
        for block in function.body.blocks:
            for binding in block.bindings:
                self.env[binding.var] = self._value(binding.value, binding.var.name)
                if forward_end is not None and binding.var.name == forward_end:
                    self.role = "gradient"
        return self._value(function.body.body, "result")

    def _value(self, value: Expr, name: str) -> Any:
        if isinstance(value, relax.Tuple):
            return tuple(self._value(v, name) for v in value.fields)
        if isinstance(value, relax.TupleGetItem):
            return self._value(value.tuple_value, name)[value.index]
        if is_const(value):
            return self.builder.const(value.value.numpy())
        if isinstance(value, relax.Var):
            return self.env[value]
        if isinstance(value, relax.Call):
            return self._call(value, name)
        raise InternalError(f"a Relax {type(value).__name__} in the graph: {value}")

    def _call(self, call: Any, name: str) -> Any:
        full = str(call.op.name)
        layer, name = layer_and_name(name)
        if full in ("relax.ones", "relax.zeros"):
            value = np.asarray(1.0 if full.endswith("ones") else 0.0, "float32")
            scalar, shape = self.builder.const(value), shape_of(call)
            if shape == ():
                return scalar
            return self.builder.node("broadcast_to", scalar, shape=shape, layer=layer, name=name)
        inputs = tuple(n for a in call.args for n in _flat(self._value(a, name)))
        if full == "relax.add":
            op, attrs = "add", {}
        elif full.startswith(PREFIX):
            op, attrs = op_name(call), attrs_of(call)
        else:
            text = "" if call.attrs is None else tvm.ir.save_json(call.attrs)
            op, attrs = "relax", {"op": full, "relax_attrs": text}
        if op == "astype":
            attrs = {"dtype": dtype_of(call)}
        if op == "dropout":
            inputs = (*inputs, self.builder.scalar("dropout_seed", "int32"))
        return self._append(op, inputs, call.ty, attrs, layer, name)

    def _append(
        self,
        op: str,
        inputs: tuple[str, ...],
        ty: Any,
        attrs: dict[str, Any],
        layer: str,
        name: str,
    ) -> Any:
        fields = ty.fields if isinstance(ty, relax.TupleType) else None
        if fields is None:
            inputs = self._simplified(op, inputs, _shape(ty))
            if op == "reshape" and self.builder.values[inputs[0]].shape == _shape(ty):
                return inputs[0]
        names = [name] if fields is None else [f"{name}.{i}" for i in range(len(fields))]
        outs = tuple(
            self.builder.define(n, _shape(t), _dtype(t), self.role)
            for n, t in zip(names, fields or [ty], strict=True)
        )
        node = Node(op, inputs, outs, attrs, layer)
        self.builder.nodes.append(node)
        self.producers.update(dict.fromkeys(outs, node))
        return outs[0] if fields is None else outs

    def _simplified(
        self, op: str, inputs: tuple[str, ...], shape: tuple[int, ...]
    ) -> tuple[str, ...]:
        """Operands without what this operator makes superfluous: a view under a view, a broadcast
        under an elementwise operator whose other operands already have its shape."""
        if op == "reshape":
            return (self._through("reshape", inputs[0]),)
        if not is_elementwise(op):
            return inputs
        for i, name in enumerate(inputs):
            thin = self._through("broadcast_to", name)
            changed = (*inputs[:i], thin, *inputs[i + 1 :])
            shapes = [self.builder.values[n].shape for n in changed]
            if thin != name and tuple(np.broadcast_shapes(*shapes)) == shape:
                inputs = changed
        return inputs

    def _through(self, op: str, name: str) -> str:
        node = self.producers.get(name)
        return node.inputs[0] if node is not None and node.op == op else name


def _flat(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(n for v in value for n in _flat(v))


def _shape(ty: Any) -> tuple[int, ...]:
    return tuple(int(d) for d in ty.shape)


def _dtype(ty: Any) -> str:
    return narrow(str(getattr(ty.dtype, "dtype", ty.dtype)))
