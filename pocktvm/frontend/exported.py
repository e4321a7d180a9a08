"""From a module to an exported program in the operators the importer wants.

The program is exported in inference form, decomposed to core operators except those that later
stages know as a whole, its tied parameters are merged, and everything that depends on no input
and no parameter (positions, masks, rotary tables) is computed here, by torch, with torch's dtypes.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from pocktvm.errors import PockError

# Operators that reach Relax whole: the gradient rules and kernels know them.
KEPT = (
    "scaled_dot_product_attention.default rms_norm.default silu.default hardswish.default "
    "hardsigmoid.default hardtanh.default elu.default leaky_relu.default softplus.default "
    "upsample_nearest2d.vec upsample_bilinear2d.vec"
).split()

# A constant is folded unless that makes it this many times larger than what it is made of.
FOLD_LIMIT = 1 << 18


@dataclass(frozen=True)
class Held:
    """A folded constant, opaque to torch.fx."""

    value: np.ndarray


def constant(held: Held) -> torch.Tensor:
    """Stands in the graph for a folded constant."""
    return torch.from_numpy(held.value)


def operator_name(node: fx.Node) -> str:
    """`aten` name with overload: convolution.default."""
    return getattr(node.target, "__name__", str(node.target))


def layer_of(node: fx.Node) -> str:
    """Path of the innermost torch module the node comes from; '' for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values()]
    return paths[-1] if paths else ""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch logs the traceback of what it raises, too: the reason is told once."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def export(
    module: torch.nn.Module, args: tuple, kwargs: Mapping[str, Any]
) -> tuple[ExportedProgram, list[float]]:
    """Export and decompose; PockError with torch's reason when it cannot.

    Beside the program: the rates of functional dropouts, which decomposition leaves out.
    """
    try:
        with warnings.catch_warnings(), _quiet():
            warnings.simplefilter("ignore")
            with torch.no_grad():
                program = torch.export.export(module, args, dict(kwargs))
            rates = _dropout_rates(program)
            _spell_feature_dropouts(program)
            return program.run_decompositions(_decompositions()), rates
    except PockError:
        raise
    except Exception as error:
        reason = [line for line in str(error).splitlines() if line.strip()][:6]
        raise PockError(
            "torch.export cannot trace the model:\n  "
            + "\n  ".join(line[:200] for line in reason)
            + "\n  Try torch.export.export(module, example_inputs) alone: data-dependent control "
            "flow has to go, shapes must be those of the example inputs."
        ) from error


def _dropout_rates(program: ExportedProgram) -> list[float]:
    names = ("dropout.default", "feature_dropout.default")
    nodes = [node for node in program.graph.nodes if operator_name(node) in names]
    return [float(node.args[1]) for node in nodes if node.args[2] and node.args[1] > 0]


def _decompositions() -> Any:
    table = torch.export.default_decompositions()
    for name in KEPT:
        operator, overload = name.split(".")
        table.pop(getattr(getattr(torch.ops.aten, operator), overload), None)
    table[torch.ops.aten.dropout.default] = _dropout
    return table


def _dropout(x: torch.Tensor, p: float, train: bool) -> torch.Tensor:
    """One operator, where torch would write random numbers."""
    return torch.ops.aten.native_dropout(x, p, True)[0] if train and p > 0 else x.clone()


def _spell_feature_dropouts(program: ExportedProgram) -> None:
    """Whole channels: x times a dropout of ones that has the first two axes alone. The table of
    decompositions is not asked for this operator."""
    aten, graph = torch.ops.aten, program.graph
    for node in [n for n in graph.nodes if operator_name(n) == "feature_dropout.default"]:
        x, p, train = node.args
        shape = [*x.meta["val"].shape[:2], *[1] * (x.meta["val"].ndim - 2)]
        with graph.inserting_before(node):
            ones = graph.call_function(aten.new_ones.default, (x, shape))
            mask = graph.call_function(aten.dropout.default, (ones, p, train))
            product = graph.call_function(aten.mul.Tensor, (x, mask))
        for made in (ones, mask, product):
            made.meta = {k: v for k, v in node.meta.items() if k != "val"}
        product.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(product)
        graph.erase_node(node)


def parameter_nodes(program: ExportedProgram) -> dict[str, fx.Node]:
    """Torch name -> placeholder, in the program's order."""
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    return {
        spec.target: nodes[spec.arg.name]
        for spec in program.graph_signature.input_specs
        if spec.kind is InputKind.PARAMETER
    }


def input_nodes(program: ExportedProgram) -> list[fx.Node]:
    """Placeholders of the caller's tensors, in order."""
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    return [
        nodes[spec.arg.name]
        for spec in program.graph_signature.input_specs
        if spec.kind is InputKind.USER_INPUT
    ]


def merge_tied(program: ExportedProgram, canonical: Mapping[str, str]) -> None:
    """Make every use of an alias a use of the first name of the tensor."""
    nodes = parameter_nodes(program)
    for name, node in nodes.items():
        if canonical[name] != name:
            node.replace_all_uses_with(nodes[canonical[name]])


def fold_constants(program: ExportedProgram) -> None:
    """Compute what depends on no input and no parameter."""
    known = _stored_tensors(program)
    graph = program.graph
    folded = []
    for node in graph.nodes:
        if node.op != "call_function" or not _foldable(node, known):
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: known[n])
        result = node.target(*args, **kwargs)
        if isinstance(result, torch.Tensor) and not _grows(result, node, known):
            known[node] = result
            folded.append(node)
    for node in folded:
        if any(user not in known for user in node.users):
            _replace(graph, node, known[node])
    graph.eliminate_dead_code()


def _stored_tensors(program: ExportedProgram) -> dict[fx.Node, torch.Tensor]:
    """Buffers and literals, unless the program writes them."""
    nodes = {node.name: node for node in graph_placeholders(program)}
    written = set(program.graph_signature.buffers_to_mutate.values())
    buffers = dict(program.named_buffers())
    known = {}
    for spec in program.graph_signature.input_specs:
        if spec.kind is InputKind.BUFFER and spec.target not in written:
            known[nodes[spec.arg.name]] = buffers[spec.target]
        elif spec.kind is InputKind.CONSTANT_TENSOR:
            known[nodes[spec.arg.name]] = program.constants[spec.target]
    return known


def graph_placeholders(program: ExportedProgram) -> list[fx.Node]:
    """The placeholders of the exported graph, in the order of its signature."""
    return [node for node in program.graph.nodes if node.op == "placeholder"]


def _foldable(node: fx.Node, known: Mapping[fx.Node, Any]) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    random = torch.Tag.nondeterministic_seeded in node.target.tags
    return not random and all(source in known for source in node.all_input_nodes)


def _grows(result: torch.Tensor, node: fx.Node, known: Mapping[fx.Node, torch.Tensor]) -> bool:
    sources = sum(known[source].numel() for source in node.all_input_nodes)
    return result.numel() > FOLD_LIMIT and result.numel() > 2 * sources


def _replace(graph: fx.Graph, node: fx.Node, value: torch.Tensor) -> None:
    # A copy: eliminating the original must not leave a view of a larger buffer behind.
    array = value.detach().contiguous().numpy().copy()
    with graph.inserting_before(node):
        held = graph.call_function(constant, (Held(array),))
    held.meta.update(node.meta)
    node.replace_all_uses_with(held)
