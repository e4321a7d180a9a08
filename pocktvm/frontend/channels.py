"""Which axes of a weight are its input and output channels, read from what reads the weight.

torch's Linear and convolutions have outputs first, inputs second: only what differs is told
(grouped and transposed convolutions, matrices multiplied from the right as they lie).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pocktvm.ir.model import Axes
from pocktvm.tvm_api import relax

_CONVS = ("relax.nn.conv2d", "relax.nn.conv1d")
_TRANSPOSED = ("relax.nn.conv2d_transpose", "relax.nn.conv1d_transpose")


def find_channels(function: Any, parameters: Sequence[str]) -> dict[str, Axes]:
    """Axes of the weights of `function`, whose last variables are `parameters`; the first reader
    decides."""
    weights = dict(zip(list(function.params)[-len(parameters) :], parameters, strict=True))
    found: dict[str, Axes] = {}
    for block in getattr(function.body, "blocks", ()) if parameters else ():
        for binding in block.bindings:
            call = binding.value
            if isinstance(call, relax.Call) and len(call.args) > 1:
                _read(call, weights, found)
    return {name: axes for name, axes in found.items() if axes != Axes()}


def _read(call: Any, weights: Mapping[Any, str], found: dict[str, Axes]) -> None:
    weight = call.args[1]
    name = weights.get(weight) if isinstance(weight, relax.Var) else None
    if name is None or name in found:
        return
    op = getattr(call.op, "name", "")
    if op in _CONVS:
        found[name] = Axes(1, 0, int(call.attrs.groups))
    elif op in _TRANSPOSED or (op == "relax.matmul" and len(weight.ty.shape) == 2):
        found[name] = Axes(0, 1)
