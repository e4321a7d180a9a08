"""Forward, loss, backward and updates as one program: the training step.

    model ──prepare──▶ Relax of our operators ──Gradient──▶ + backward ──to_graph──▶ Graph ──▶ + updates

`relax.transform.Gradient` is asked for the tensors that learn and nothing else, so the backward is
pruned exactly: no weight gradient of a frozen tensor, no input gradient below the earliest tensor
that learns. The gradient of each operator is one function in rules/.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pocktvm.autodiff.join_slices import join_slices
from pocktvm.autodiff.losses import Loss
from pocktvm.autodiff.micro_batch import unroll
from pocktvm.autodiff.ops import PREFIX, dtype_of, layer_and_name
from pocktvm.autodiff.optimizers import Optimizer
from pocktvm.autodiff.prepare import ENTRY, Prepared, prepare
from pocktvm.autodiff.rules import RULES
from pocktvm.autodiff.rules.registry import ensure_registered, needing
from pocktvm.autodiff.to_graph import Converter, GraphBuilder
from pocktvm.errors import PockError
from pocktvm.ir.graph import Graph, Param
from pocktvm.ir.model import Model
from pocktvm.ir.part import Part
from pocktvm.ir.rates import Rates
from pocktvm.tvm_api import relax


def differentiate(
    model: Model,
    updated: Mapping[str, float],
    loss: Loss,
    optimizer: Optimizer,
    rates: Rates | None = None,
    parts_of_batch: int = 1,
) -> tuple[Graph, Graph]:
    """The step and predict programs of `model` when `updated` (parameter -> share) learns; a share
    that is a `Part` names the slice. With `rates` the step has them as its last input. With several
    `parts_of_batch`, `model` is that of one part and the step runs them one after the other (its
    predict is then of no use).

    Raises PockError for an operator without a gradient on the way to a tensor that learns (all of
    them at once), and when no tensor of `updated` reaches the loss.
    """
    prepared = prepare(model, loss)
    function = prepared.module[ENTRY]
    index = {name: i for i, name in enumerate(prepared.names)}
    wanted = {name: function.params[index[name]] for name in updated}
    needed = _needed(function, [v.name for v in wanted.values()])
    reached = _reached(function)
    trained = [name for name, var in wanted.items() if var.name in reached]
    if not trained:
        raise PockError("none of the tensors that should learn has any influence on the loss.")
    _check_rules(function, needed & reached)
    with needing(needed & reached):
        gradient = relax.transform.Gradient(ENTRY, require_grads=[wanted[n] for n in trained])
        module = gradient(prepared.module)
    parts = {n: part for n in trained if isinstance(part := updated[n], Part)}
    builder, value, gradients = _backward(
        model, prepared, module[f"{ENTRY}_adjoint"], trained, parts
    )
    if parts_of_batch > 1:
        builder, value, gradients = unroll(builder, value, gradients, parts_of_batch, loss)
    if rates is not None:
        builder.input(rates.input.name, rates.input.shape, rates.input.dtype)
    updates = optimizer.apply(builder, dict(zip(trained, gradients, strict=True)), parts, rates)
    return builder.graph({"loss": value}, updates), predict_graph(model, trained, parts)


def _backward(
    model: Model,
    prepared: Prepared,
    function: Any,
    trained: list[str],
    parts: Mapping[str, Part],
) -> tuple[GraphBuilder, str, list[str]]:
    """The program up to the gradients: its builder, the loss, a gradient for each trained one."""
    builder = GraphBuilder("step")
    env = _sources(builder, model, prepared, function, trained, parts)
    converter = Converter(builder, env)
    forward_end = prepared.module[ENTRY].body.body.name
    loss, gradients = converter.run(function, forward_end)
    builder.nodes = join_slices(builder.nodes, builder.values)
    return builder, loss, list(gradients)


def predict_graph(
    model: Model, trained: Sequence[str] = (), parts: Mapping[str, Part] | None = None
) -> Graph:
    """The forward program alone; `trained` are its parameters, all others constants."""
    prepared = prepare(model, None)
    function = prepared.module[ENTRY]
    builder = GraphBuilder("predict")
    env = _sources(builder, model, prepared, function, trained, parts or {})
    converter = Converter(builder, env)
    return builder.graph({"output": converter.run(function)}, {})


def _sources(
    builder: GraphBuilder,
    model: Model,
    prepared: Prepared,
    function: Any,
    trained: Sequence[str],
    parts: Mapping[str, Part],
) -> dict[Any, str]:
    """Declare inputs, tensors that learn and frozen ones; the function's variables by name."""
    shapes = {i.name: i for i in prepared.inputs}
    env = {}
    for var, name in zip(function.params, prepared.names, strict=True):
        if name in shapes:
            env[var] = builder.input(name, shapes[name].shape, shapes[name].dtype)
            continue
        parameter = model.parameters[name]
        if name in trained:
            value = parameter.value.astype("float32", copy=False)
            # of a selectable part every index may have learned: it is kept whole
            part = parts.get(name)
            fixed = None if part is None or part.selectable else part
            param = Param(name, value, "trained", None, parameter.aliases, fixed)
            env[var] = builder.param(param)
        else:
            env[var] = builder.frozen(name, parameter.value)
    return env


def _bindings(function: Any) -> list[Any]:
    return [b for block in function.body.blocks for b in block.bindings]


def _operands(value: Any) -> list[Any]:
    """Variables an expression reads."""
    if isinstance(value, relax.Var):
        return [value]
    if isinstance(value, relax.Tuple):
        return [v for f in value.fields for v in _operands(f)]
    if isinstance(value, relax.TupleGetItem):
        return _operands(value.tuple_value)
    return [v for a in value.args for v in _operands(a)] if isinstance(value, relax.Call) else []


def _floating(var: Any) -> bool:
    return isinstance(var.ty, relax.TupleType) or dtype_of(var) == "float32"


def _needed(function: Any, trained: list[str]) -> frozenset[str]:
    """Names of the floating values that depend on a tensor that learns."""
    needed = set(trained)
    for binding in _bindings(function):
        reads = {v.name for v in _operands(binding.value)}
        if reads & needed and _floating(binding.var):
            needed.add(binding.var.name)
    return frozenset(needed)


def _reached(function: Any) -> frozenset[str]:
    """Names of the values the loss depends on through floating operators."""
    reached = {function.body.body.name}
    for binding in reversed(_bindings(function)):
        if binding.var.name in reached and _floating(binding.var):
            reached |= {v.name for v in _operands(binding.value)}
    return frozenset(reached)


def _check_rules(function: Any, needed: frozenset[str]) -> None:
    """Raise PockError listing every operator on a path of gradients that has no rule."""
    missing: dict[str, list[str]] = {}
    for binding in _bindings(function):
        call = binding.value
        if not isinstance(call, relax.Call):
            continue
        full = str(call.op.name)
        name = full.removeprefix(PREFIX)
        if name in RULES:
            continue
        if full == name:
            ensure_registered(full)
        if binding.var.name in needed and any(v.name in needed for v in _operands(call)):
            missing.setdefault(full, []).append(layer_and_name(binding.var.name)[0])
    if missing:
        raise PockError(_missing_message(missing))


def _missing_message(missing: dict[str, list[str]]) -> str:
    (first, layers), *others = missing.items()
    text = f"no gradient for '{first}' (layer '{layers[0]}')"
    if others:
        text += "; also missing: " + ", ".join(f"'{n}' (layer '{ls[0]}')" for n, ls in others[:12])
    last = list(missing.values())[-1][-1]
    return (
        f"{text}.\n  Freeze everything before '{last}' (--scheme blocks:N or last), or add one "
        "function to pocktvm/autodiff/rules/."
    )
