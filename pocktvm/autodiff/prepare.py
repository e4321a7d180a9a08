"""An imported model as one Relax function of our own operators, with the loss behind it.

Everything autodiff and the passes need not know twice is settled here: 64-bit types are narrowed,
tuples are taken apart, spelt-out activations and norms are put together (lowering/).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pocktvm.autodiff.losses import Loss
from pocktvm.autodiff.lowering import LOWERINGS
from pocktvm.autodiff.lowering.low_rank import adapted
from pocktvm.autodiff.ops import Emitter, Expr, constant, dtype_of, is_const, shape_of
from pocktvm.errors import PockError
from pocktvm.ir.model import Input, Model
from pocktvm.tvm_api import IRModule, relax

ENTRY = "main"


@dataclass(frozen=True)
class Prepared:
    """`module["main"]` takes `names` in order: inputs, labels if any, then parameters."""

    module: IRModule
    names: tuple[str, ...]
    inputs: tuple[Input, ...]


def prepare(model: Model, loss: Loss | None) -> Prepared:
    """The forward function of `model`; with a loss, the function that returns it.

    Raises PockError naming every operator that neither we nor TVM's legalization can take.
    """
    function = model.module[ENTRY]
    label = loss.label_input(model.output_shape) if loss is not None else None
    inputs = (*model.inputs.values(), *([label] if label is not None else []))
    x_count = len(model.inputs)
    params = [
        _narrowed(var, name) for var, name in zip(function.params, _names(model), strict=True)
    ]
    labels = [] if label is None else [_variable(label)]
    builder = relax.BlockBuilder()
    all_params = [*params[:x_count], *labels, *params[x_count:]]
    with builder.function(ENTRY, all_params):
        with builder.dataflow():
            env = dict(zip(function.params, params, strict=True))
            walker = _Walker(builder, env, model, training=loss is not None)
            result = walker.run(function)
            if loss is not None:
                walker.emitter.layer = "loss"
                result = loss.emit(walker.emitter, result, labels[0] if labels else None)
            output = builder.emit_output(result)
        builder.emit_func_output(output)
    module = relax.transform.DeadCodeElimination()(builder.get())
    names = (*model.inputs, *(["y"] if labels else []), *model.parameters)
    return Prepared(module, tuple(names), inputs)


def _names(model: Model) -> tuple[str, ...]:
    return (*model.inputs, *model.parameters)


def _narrowed(var: Any, name: str) -> Any:
    return relax.Var(name, relax.TensorType(list(shape_of(var)), dtype_of(var)))


def _variable(label: Input) -> Any:
    return relax.Var(label.name, relax.TensorType(list(label.shape), label.dtype))


class _Walker:
    """Rewrites one function binding by binding; `env` maps its variables to ours."""

    def __init__(
        self, builder: Any, env: dict[Any, Any], model: Model, training: bool
    ) -> None:
        self.emitter = Emitter(builder)
        self.emitter.padding = model.padding
        self.emitter.drops = 0 if model.dropout and training else None
        self.known_layers = model.layers
        self.adapters = model.adapters
        self.parameters = {v.name: v for v in env.values() if v.name in model.parameters}
        self.env = env
        self.unsupported: dict[str, list[str]] = {}
        # the layer of a value, and whether it is made of parameters alone
        self.layers = {
            var: (
                name.rpartition(".")[0] if name in model.parameters else "",
                i >= len(model.inputs),
            )
            for i, (var, name) in enumerate(zip(env, _names(model), strict=True))
        }

    def run(self, function: Any) -> Expr:
        """Rewrite the body; returns what the function returns."""
        body = function.body
        for block in body.blocks if hasattr(body, "blocks") else ():
            for binding in block.bindings:
                self.emitter.layer, pure = self._layer(binding)
                self.layers[binding.var] = (self.emitter.layer, pure)
                self.env[binding.var] = self._value(binding.value)
        if self.unsupported:
            raise PockError(_unsupported(self.unsupported))
        result = self._value(body.body if hasattr(body, "body") else body)
        if isinstance(result, tuple) and len(result) == 1:
            result = result[0]
        if isinstance(result, tuple):
            raise PockError(
                f"the model returns {len(result)} tensors; return the one the loss reads "
                "(wrap the module and pick it)."
            )
        return result

    def _layer(self, binding: Any) -> tuple[str, bool]:
        """What the frontend says; else a parameter among the operands decides, or the first."""
        found = [self.layers[v] for v in _variables(binding.value) if v in self.layers]
        pure = all(p for _, p in found)
        known = self.known_layers.get(binding.var.name)
        own = [layer for layer, p in found if p and layer]
        return known or [*own, *(layer for layer, _ in found), ""][0], pure

    def _value(self, value: Any) -> Any:
        if isinstance(value, relax.Tuple):
            return tuple(self._value(v) for v in value.fields)
        if isinstance(value, relax.TupleGetItem):
            return self._value(value.tuple_value)[value.index]
        if is_const(value):
            return constant(value.value.numpy())
        if isinstance(value, relax.Var):
            return self.env[value]
        if isinstance(value, relax.Call):
            return self._call(value)
        return value  # shapes and numbers, read by the lowering itself

    def _call(self, call: Any) -> Any:
        name = getattr(call.op, "name", None) or str(call.op)
        lowering = LOWERINGS.get(name)
        args = [self._value(a) for a in call.args]
        if lowering is not None:
            result = lowering(call, args, self.emitter)
            return adapted(call, args, result, self.adapters, self.parameters, self.emitter)
        if not _legalizable(call, args):
            self.unsupported.setdefault(name, []).append(self.emitter.layer or "the input")
            return call
        return self.emitter.bind(relax.Call(call.op, args, attrs=call.attrs), name.split(".")[-1])


def _variables(value: Any) -> Sequence[Any]:
    if isinstance(value, relax.Var):
        return [value]
    if isinstance(value, relax.Tuple):
        return [v for f in value.fields for v in _variables(f)]
    if isinstance(value, relax.TupleGetItem):
        return _variables(value.tuple_value)
    return [v for a in value.args for v in _variables(a)] if isinstance(value, relax.Call) else []


def _legalizable(call: Any, args: Sequence[Any]) -> bool:
    """An operator of tensors alone that TVM can legalize: the fallback writes its kernel."""
    tensors = all(isinstance(a, relax.Var) or is_const(a) for a in args)
    one = isinstance(call.ty, relax.TensorType) and call.ty.shape is not None
    has_rule = hasattr(call.op, "get_attr") and call.op.get_attr("FLegalize") is not None
    return tensors and one and has_rule


def _unsupported(found: dict[str, list[str]]) -> str:
    lines = [
        f"  '{name}' (layer '{layers[0]}'{f' and {len(layers) - 1} more' if layers[1:] else ''})"
        for name, layers in list(found.items())[:20]
    ]
    return "\n".join(
        [
            f"no lowering for {len(found)} operator(s) of this model:",
            *lines,
            "  Rewrite these layers with other operators, or add one function each to "
            "pocktvm/autodiff/lowering/.",
        ]
    )
