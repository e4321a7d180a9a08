"""An adapter's products behind the product it adapts: y + scale * B (A x)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pocktvm.autodiff.lowering.linear import geometry, high, product
from pocktvm.autodiff.ops import Emitter, Expr, shape_of
from pocktvm.ir.lora import Adapter
from pocktvm.tvm_api import relax

_CONVS = ("relax.nn.conv2d", "relax.nn.conv1d")


def adapted(
    call: Any,
    args: list[Expr],
    y: Expr,
    adapters: Mapping[str, Adapter],
    variables: Mapping[str, Expr],
    e: Emitter,
) -> Expr:
    """The lowered `call` with its weight's adapter; `y` itself where it has none."""
    op = getattr(call.op, "name", "")
    if not adapters or op not in ("relax.matmul", *_CONVS):
        return y
    turned = e.call_of(args[1], "permute_dims")
    weight = args[1] if turned is None else turned.args[0]
    adapter = adapters.get(weight.name) if isinstance(weight, relax.Var) else None
    if adapter is None:
        return y
    a, b = variables[adapter.a], variables[adapter.b]
    if op in _CONVS:
        update = _conv(call, args[0], a, b, e)
    else:
        lead = shape_of(args[0])[:-1]
        inner = product(args[0], e.permute(a, (1, 0)), e)
        update = e.reshape(product(inner, e.permute(b, (1, 0)), e), (*lead, shape_of(b)[0]))
    return e.add(y, e.multiply(e.reshape(update, shape_of(y)), adapter.scale))


def _conv(call: Any, x: Expr, a: Expr, b: Expr, e: Emitter) -> Expr:
    x, a, b = (e.reshape(v, high(shape_of(v))) for v in (x, a, b))
    n, _, h, w = high(shape_of(call))
    attrs = geometry(call.attrs)
    inner = e.op("conv2d", x, a, shape=(n, shape_of(a)[0], h, w), **attrs)
    one = {**attrs, "strides": (1, 1), "padding": (0, 0, 0, 0), "dilation": (1, 1)}
    return e.op("conv2d", inner, b, shape=(n, shape_of(b)[0], h, w), **one)
