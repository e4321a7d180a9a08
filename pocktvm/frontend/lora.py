"""Gives a model the adapters its scheme asks for: new parameters beside frozen weights.

The products themselves are written where the model is lowered (autodiff/lowering/low_rank.py).
"""

from __future__ import annotations

import zlib
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from pocktvm.errors import PockError
from pocktvm.ir.lora import Adapter, LoRA
from pocktvm.ir.model import Axes, Model, Parameter
from pocktvm.ir.scheme import Scheme, last_blocks, under
from pocktvm.tvm_api import relax

_CONVS = ("relax.nn.conv2d", "relax.nn.conv1d")


def add_adapters(model: Model, scheme: Scheme) -> Model:
    """`model` with A and B beside each weight a LoRA scheme adapts; any other scheme: as it is.

    Raises PockError where there is nothing to adapt.
    """
    if not isinstance(scheme, LoRA):
        return model
    inside = under(last_blocks(model, scheme.count, str(scheme)))
    able = [n for n in _products(model) if inside(n)]
    chosen = [n for n in able if any(fnmatchcase(n, p) for p in scheme.patterns())]
    if not chosen:
        there = ", ".join(able[:6]) or "no matrix and no ungrouped convolution"
        raise PockError(f"the scheme '{scheme}' adapts nothing; those blocks hold {there}.")
    adapters = {name: _adapter(model, name, scheme) for name in chosen}
    made = {p.name: p for name in chosen for p in _matrices(model, name, adapters[name], scheme)}
    function = model.module["main"]
    new = [
        relax.Var(p.name, relax.TensorType(list(p.value.shape), "float32")) for p in made.values()
    ]
    function = relax.Function(
        [*function.params, *new], function.body, function.ret_ty, function.is_pure, function.attrs
    )
    module = model.module.clone()
    module.update_func(module.get_global_var("main"), function)
    return replace(
        model, module=module, parameters={**model.parameters, **made}, adapters=adapters
    )


def _products(model: Model) -> list[str]:
    """Weights of matrix products and of ungrouped convolutions, in the model's order."""
    function = model.module["main"]
    count = len(function.params) - len(model.parameters)
    source: dict[Any, str] = dict(
        zip(list(function.params)[count:], model.parameters, strict=True)
    )
    found = set()
    for block in getattr(function.body, "blocks", ()):
        for binding in block.bindings:
            call = binding.value
            if not isinstance(call, relax.Call) or not call.args:
                continue
            op, weight = getattr(call.op, "name", ""), call.args[-1]
            name = source.get(weight) if isinstance(weight, relax.Var) else None
            if name is None:
                continue
            if op == "relax.permute_dims":
                source[binding.var] = name
            elif op == "relax.matmul" or (op in _CONVS and int(call.attrs.groups) == 1):
                found.add(name)
    plain = {n: p for n, p in model.parameters.items() if p.value.ndim >= 2 and not p.aliases}
    return [n for n in plain if n in found]


def _adapter(model: Model, name: str, scheme: LoRA) -> Adapter:
    stem = name.removesuffix(".weight")
    turned = model.parameters[name].value.ndim == 2 and model.channels.get(name) == Axes(0, 1)
    return Adapter(f"{stem}.lora_A", f"{stem}.lora_B", scheme.alpha / scheme.r, turned)


def _matrices(model: Model, name: str, adapter: Adapter, scheme: LoRA) -> list[Parameter]:
    """A as torch starts a Linear, B zero: the first step is the base model's."""
    shape = model.parameters[name].value.shape
    outputs, inner = (shape[1], shape[:1]) if adapter.turned else (shape[0], shape[1:])
    bound = 1 / np.sqrt(np.prod(inner))
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    a = rng.uniform(-bound, bound, (scheme.r, *inner)).astype(np.float32)
    b = np.zeros((outputs, scheme.r, *(1 for _ in inner[1:])), np.float32)
    return [Parameter(adapter.a, a), Parameter(adapter.b, b)]

