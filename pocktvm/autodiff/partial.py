"""Tensors that learn in part, or at rates of their own.

    w' = w - lr * dw      →   p = take(w);  p' = p - lr * take(dw);  w' = put(w, p')

The forward reads the whole weight. Of its gradient a slice is asked, which passes/sink_slices.py
carries through the weight gradient to the activation; the optimizer sees a tensor of the slice's
shape, so its state has it, too; `put` writes the slice into the weight where it lies. The indices
are constants, or of a selectable part an int32 parameter that the trainer may change.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pocktvm.autodiff.to_graph import GraphBuilder
from pocktvm.ir.graph import Param
from pocktvm.ir.part import Part
from pocktvm.ir.rates import RATES, Rates


def take_parts(
    builder: GraphBuilder, gradients: Mapping[str, str], parts: Mapping[str, Part]
) -> tuple[dict[str, str], dict[str, str]]:
    """(tensor -> gradient of what learns of it, tensor -> value of what learns of it)."""
    cut, slices = dict(gradients), {}
    for tensor, part in parts.items():
        indices = _indices(builder, tensor, part)
        cut[tensor] = _take(builder, gradients[tensor], part, indices, f"{tensor}:grad")
        slices[tensor] = _take(builder, tensor, part, indices, f"{tensor}:part")
        # in front of the forward: an update is fused with its gradient where its operands exist
        builder.nodes.insert(0, builder.nodes.pop())
    return cut, slices


def put_part(builder: GraphBuilder, tensor: str, part: Part, value: str) -> str:
    """`tensor` with `value` in place of its slice; to be its update."""
    indices = _indices(builder, tensor, part)
    whole = builder.values[tensor]
    return builder.node(
        "put", tensor, indices, value,
        shape=whole.shape, role="gradient", layer=tensor.rpartition(".")[0],
        name=f"{tensor}:put", axis=part.axis,
    )  # fmt: skip


def take_rates(builder: GraphBuilder, rates: Rates, tensor: str) -> str:
    """The tensor's factors of the learning rate, as a tensor that broadcasts to it."""
    slot = rates.slots[tensor]
    layer, hint = tensor.rpartition(".")[0], f"{tensor}:rates"
    cut = builder.node(
        "strided_slice", RATES, shape=(slot.count,), role="gradient", layer=layer, name=hint,
        begin=(slot.begin,), end=(slot.begin + slot.count,), strides=(1,),
    )  # fmt: skip
    if slot.shape == (slot.count,):
        return cut
    return builder.node(
        "reshape", cut, shape=slot.shape, role="gradient", layer=layer, name=f"{hint}_view"
    )


def _take(builder: GraphBuilder, name: str, part: Part, indices: str, hint: str) -> str:
    shape = list(builder.values[name].shape)
    shape[part.axis] = len(part.indices)
    return builder.node(
        "take", name, indices,
        shape=shape, role="gradient", layer=hint.rpartition(":")[0].rpartition(".")[0],
        name=hint, axis=part.axis, mode="clip",
    )  # fmt: skip


def _indices(builder: GraphBuilder, tensor: str, part: Part) -> str:
    indices = np.asarray(part.indices, np.int32)
    if not part.selectable:
        return builder.const(indices)
    name = f"selection/{tensor}"
    return builder.param(Param(name, indices, "selection", selects=(tensor, part.axis)))
