"""What cannot be imported, said all at once; what is imported differently, said once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from pocktvm.errors import PockError
from pocktvm.frontend.exported import input_nodes, layer_of, operator_name

BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)
DROPOUTS = (nn.modules.dropout._DropoutNd,)
# With dropout asked for, what still computes as in inference: statistics, other random layers.
STAYS_IN_EVAL = (
    *BATCH_NORMS, nn.modules.instancenorm._InstanceNorm, nn.RReLU, nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)  # fmt: skip
LISTED = 18  # operators in one message


def notices(
    module: nn.Module, program: ExportedProgram, dropouts: Sequence[float], dropout: bool = False
) -> list[str]:
    """What the user should know, one line each.

    `module` is as the user gave it; `dropouts` are the rates of functional ones.
    """
    lines = []
    norms = [m for m in module.modules() if isinstance(m, BATCH_NORMS)]
    if any(m.training and m.track_running_stats for m in norms):
        lines.append(
            f"the model came in training mode: its {len(norms)} batch norms use their stored "
            "statistics, as after .eval(), and do not update them"
        )
    lines += _dropout_notice(module, dropouts, dropout)
    written = sorted(set(program.graph_signature.buffers_to_mutate.values()))
    if written:
        lines.append(f"the model writes buffers {', '.join(written[:3])}: they stay as they are")
    return lines


def _dropout_notice(module: nn.Module, functional: Sequence[float], dropout: bool) -> list[str]:
    """`functional`: the rates of what the exported program really drops."""
    if dropout:
        alpha = [m for m in module.modules() if isinstance(m, STAYS_IN_EVAL[-2:]) and m.p > 0]
        lines = [f"{len(alpha)} alpha dropouts are left out"] if alpha else []
        return lines + ([] if functional else ["the model has no dropout: --dropout does nothing"])
    rates = [m.p for m in module.modules() if isinstance(m, DROPOUTS) and m.p > 0]
    rates += functional
    if not rates:
        return []
    many = f"p up to {max(rates):g}, {len(rates)} in all"
    return [f"dropout ({many}) is left out; --dropout keeps it"]


def check_supported(program: ExportedProgram, supported: Iterable[str]) -> None:
    """Raise PockError that lists every operator without a converter, with its layers."""
    known = set(supported)
    missing: dict[str, list[str]] = {}
    for node in program.graph.nodes:
        if node.op == "call_function" and operator_name(node) not in known:
            layers = missing.setdefault(operator_name(node), [])
            if layer_of(node) not in layers:
                layers.append(layer_of(node))
    if not missing:
        return
    lines = [f"  {name}  ({_places(layers)})" for name, layers in missing.items()]
    if len(lines) > LISTED:
        lines = lines[:LISTED] + [f"  … and {len(lines) - LISTED} more"]
    count = "an operator" if len(missing) == 1 else f"{len(missing)} operators"
    raise PockError(
        f"the model uses {count} that cannot be imported:\n"
        + "\n".join(lines)
        + "\n  Write these layers with other operators, or add a converter for each to "
        "pocktvm/frontend/converters/."
    )


def _places(layers: list[str]) -> str:
    shown = ", ".join(f"'{layer}'" if layer else "the model itself" for layer in layers[:3])
    word = "layer" if len(layers) == 1 else "layers"
    return f"{word} {shown}" + (f", … {len(layers)} in all" if len(layers) > 3 else "")


def check_tensors(module: nn.Module) -> None:
    """Raise PockError for parameters that hold no numbers: meta device, NaN, infinity."""
    for name, tensor in module.named_parameters():
        if tensor.is_meta:
            raise PockError(f"'{name}' is on the meta device: load its weights first.")
        if not bool(torch.isfinite(tensor).all()):
            raise PockError(f"the parameter '{name}' holds NaN or infinity: mend the weights.")


def check_interface(program: ExportedProgram) -> None:
    """One float32 tensor out; float32 or integer tensors in, of fixed shape."""
    for node in input_nodes(program):
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            continue  # a Python number: part of the program by now
        allowed = (torch.float32, torch.int32, torch.int64)
        if value.dtype not in allowed:
            fix = "Convert it inside forward (mask.bool(), x.double()) and pass an int or float."
            if value.dtype in (torch.float16, torch.bfloat16):
                fix = "Give the model and its inputs as float32: module.float(), x.float()."
            raise PockError(
                f"input '{node.name}' is {_plain(value.dtype)}; a step reads float32 or integers. "
                + fix
            )
    outputs = _outputs(program)
    if len(outputs) != 1 or not isinstance(outputs[0], torch.Tensor):
        raise PockError(
            f"the model returns {len(outputs)} values; a step needs one tensor. Wrap the module "
            "so that forward returns the logits (or, with --loss none, the loss)."
        )
    if outputs[0].dtype != torch.float32:
        raise PockError(
            f"the model returns {_plain(outputs[0].dtype)}; a step needs float32 outputs."
        )


def _outputs(program: ExportedProgram) -> list[Any]:
    users = set(program.graph_signature.user_outputs)
    (output,) = [node for node in program.graph.nodes if node.op == "output"]
    return [
        node.meta["val"] if isinstance(node, torch.fx.Node) else node
        for node in output.args[0]
        if not isinstance(node, torch.fx.Node) or node.name in users
    ]


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
