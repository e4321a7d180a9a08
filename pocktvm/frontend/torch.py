"""A torch module becomes a Model: torch.export, then Relax operator by operator.

The module is never mutated: a copy in inference form is exported. Names, tied weights, blocks and
the rest a scheme speaks of are read from the module and the exported program (structure.py).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.export import ExportedProgram

from pocktvm.errors import PockError
from pocktvm.frontend import checks, exported, structure
from pocktvm.frontend.importer import make_importer
from pocktvm.ir.model import Input, Model, Parameter
from pocktvm.tvm_api import relax


def import_torch(
    module: nn.Module,
    example_inputs: Any,
    *,
    name: str = "model",
    scheme: Mapping[str, Any] | None = None,
    mean: Sequence[float] = (),
    scale: Sequence[float] = (),
    dropout: bool = False,
) -> Model:
    """Import a module at the shapes of its example inputs (a tensor, a tuple, or a dict by name).

    `mean` and `scale`, per channel, tell the device how to read uint8 samples of the first image
    input. With `dropout` the training step drops, whatever mode the module is in; without it
    dropouts are identities. Raises PockError when torch.export fails, when operators have no
    converter (all of them listed), and when the model does not return one float32 tensor.
    """
    if not isinstance(module, nn.Module):
        kind = type(module).__name__
        raise PockError(f"the model is an nn.Module or the path of an .onnx file, not {kind}.")
    args, kwargs = _arguments(example_inputs)
    notices: list[str] = []
    program_module = _inference_copy(module, notices, dropout)
    checks.check_tensors(program_module)
    program, dropouts = exported.export(program_module, args, kwargs)
    canonical = structure.canonical_names(program_module)
    blocks = structure.find_blocks(program_module)
    exported.fold_constants(program)
    classifier = structure.find_classifier(program, program_module, blocks)
    exported.merge_tied(program, canonical)
    checks.check_interface(program)
    padding, bounds = structure.find_embeddings(program)
    main, layers, inputs = _translate(program, canonical)
    model = Model(
        name=name,
        module=main,
        inputs={n.name: _input(n, bounds, mean, scale) for n in inputs},
        parameters=_parameters(module, program_module, canonical),
        output_shape=tuple(int(d) for d in main["main"].ret_ty.shape.values),
        blocks=blocks,
        classifier=classifier,
        scheme=scheme,
        shifts=structure.find_shifts(program),
        padding=padding,
        layers=layers,
        notices=tuple(notices + checks.notices(module, program, dropouts, dropout)),
        dropout=dropout,
    )
    return model


def _arguments(example_inputs: Any) -> tuple[tuple, dict[str, Any]]:
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, list | tuple):
        return tuple(example_inputs), {}
    raise PockError(
        "example inputs are a tensor, a tuple of tensors or a dict by argument name, "
        f"not {type(example_inputs).__name__}."
    )


def _inference_copy(module: nn.Module, notices: list[str], dropout: bool) -> nn.Module:
    copied = copy.deepcopy(module).eval()
    if dropout:  # functional dropouts ask the module they stand in; norms keep their statistics
        for part in copied.modules():
            part.training = not isinstance(part, checks.STAYS_IN_EVAL)
    narrow = {
        str(t.dtype).removeprefix("torch.")
        for t in [*copied.parameters(), *copied.buffers()]
        if t.is_floating_point() and t.dtype != torch.float32
    }
    if narrow:
        notices.append(f"{', '.join(sorted(narrow))} tensors are trained as float32")
        copied = copied.float()
    return copied


def _translate(
    program: ExportedProgram, canonical: Mapping[str, str]
) -> tuple[Any, dict[str, str], list[Any]]:
    importer = make_importer()
    checks.check_supported(program, importer.convert_map)
    module = importer.from_exported_program(program, True, True, False, None)
    main = module["main"].without_attr("params").without_attr("num_input")
    variables = {var.name: var for var in main.params}
    inputs = exported.input_nodes(program)
    inputs = [node for node in inputs if isinstance(node.meta.get("val"), torch.Tensor)]
    nodes = exported.parameter_nodes(program)
    order = [node.name for node in inputs]
    order += [nodes[n].name for n in _ordered(canonical)]
    main = relax.Function(
        [variables[n] for n in order], main.body, main.ret_ty, main.is_pure, main.attrs
    )
    module.update_func(module.get_global_var("main"), main)
    module = relax.transform.DeadCodeElimination(["main"])(module)
    return module, dict(importer.layers), inputs


def _ordered(canonical: Mapping[str, str]) -> list[str]:
    return [name for name, first in canonical.items() if name == first]


def _parameters(
    given: nn.Module, copied: nn.Module, canonical: Mapping[str, str]
) -> dict[str, Parameter]:
    values = dict(copied.named_parameters())
    learns = {n: p.requires_grad for n, p in given.named_parameters(remove_duplicate=False)}
    return {
        name: Parameter(
            name=name,
            value=np.ascontiguousarray(values[name].detach().numpy()),
            requires_grad=learns[name],
            aliases=tuple(a for a, first in canonical.items() if first == name and a != name),
        )
        for name in _ordered(canonical)
    }


def _input(
    node: torch.fx.Node, bounds: Mapping[str, int], mean: Sequence[float], scale: Sequence[float]
) -> Input:
    value = node.meta["val"]
    floating = value.is_floating_point()
    image = floating and value.ndim == 4
    return Input(
        name=node.name,
        shape=tuple(int(d) for d in value.shape),
        dtype="float32" if floating else "int32",
        bound=bounds.get(node.name),
        mean=tuple(mean) if image else (),
        scale=tuple(scale) if image else (),
    )
