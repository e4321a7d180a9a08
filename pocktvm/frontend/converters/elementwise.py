"""Operators that read one element of each operand, with torch's rules of promotion."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx

from pocktvm.frontend.converters.registry import (
    Converter,
    argument,
    const,
    converts,
    dropped,
    dtype_of,
    operand,
    result_dtype,
)
from pocktvm.tvm_api import relax


def _clip(importer: Any, x: Any, low: float | None, high: float | None) -> Any:
    if (low, high) == (0, 6):
        return importer.block_builder.emit(relax.op.nn.relu6(x))
    if (low, high) == (0, None):
        return importer.block_builder.emit(relax.op.nn.relu(x))
    floating = dtype_of(x).startswith("float")
    info, number = (np.finfo("float32"), float) if floating else (np.iinfo(dtype_of(x)), int)
    low = number(info.min if low is None else low)
    high = number(info.max if high is None else high)
    return importer.block_builder.emit(relax.op.clip(x, low, high))


@converts("hardtanh.default", "hardtanh_.default")
def _hardtanh(importer: Any, node: fx.Node) -> Any:
    low, high = argument(node, 1, "min_val", -1.0), argument(node, 2, "max_val", 1.0)
    return _clip(importer, importer.env[node.args[0]], low, high)


@converts("clamp.default", "clamp.Tensor")
def _clamp(importer: Any, node: fx.Node) -> Any:
    x, emit = importer.env[node.args[0]], importer.block_builder.emit
    low, high = argument(node, 1, "min"), argument(node, 2, "max")
    if isinstance(low, fx.Node):
        x, low = emit(relax.op.maximum(x, importer.env[low])), None
    if isinstance(high, fx.Node):
        x, high = emit(relax.op.minimum(x, importer.env[high])), None
    return x if low is high is None else _clip(importer, x, low, high)


@converts("clamp_min.default")
def _clamp_min(importer: Any, node: fx.Node) -> Any:
    return _clip(importer, importer.env[node.args[0]], argument(node, 1, "min"), None)


@converts("clamp_max.default")
def _clamp_max(importer: Any, node: fx.Node) -> Any:
    return _clip(importer, importer.env[node.args[0]], None, argument(node, 1, "max"))


@converts("elu.default", "elu_.default")
def _elu(importer: Any, node: fx.Node) -> Any:
    """SELU arrives as an ELU with a scale."""
    alpha, scale = argument(node, 1, "alpha", 1.0), argument(node, 2, "scale", 1.0)
    if argument(node, 3, "input_scale", 1.0) != 1.0:
        raise ValueError("input_scale is not 1")
    curve = _exponential_unit(importer, importer.env[node.args[0]], alpha)
    if scale == 1.0:
        return curve
    return importer.block_builder.emit(relax.op.multiply(curve, const(scale, dtype_of(curve))))


def _exponential_unit(importer: Any, x: Any, alpha: float) -> Any:
    """where(x > 0, x, alpha * (exp(min(x, 0)) - 1)): no overflow in the branch not taken."""
    emit, dtype = importer.block_builder.emit, dtype_of(x)
    zero = const(0, dtype)
    curve = emit(relax.op.exp(emit(relax.op.minimum(x, zero))))
    curve = emit(relax.op.subtract(curve, const(1, dtype)))
    curve = emit(relax.op.multiply(curve, const(alpha, dtype)))
    return emit(relax.op.where(emit(relax.op.greater(x, zero)), x, curve))


# torch's sum and product of truth values
LOGICAL = {relax.op.add: relax.op.logical_or, relax.op.multiply: relax.op.logical_and}


def _pair(importer: Any, node: fx.Node, scaled: int) -> list[Any]:
    """Both operands in torch's result type, `alpha` times the one numbered `scaled`."""
    dtype = result_dtype(node)
    pair = [operand(importer, value, dtype) for value in node.args[:2]]
    alpha = argument(node, 2, "alpha", 1)
    if alpha != 1:
        product = relax.op.multiply(pair[scaled], const(alpha, dtype))
        pair[scaled] = importer.block_builder.emit(product)
    return pair


def _arithmetic(function: Any) -> Converter:
    """function(x, alpha y)."""

    def convert(importer: Any, node: fx.Node) -> Any:
        chosen = LOGICAL[function] if result_dtype(node) == "bool" else function
        return importer.block_builder.emit(chosen(*_pair(importer, node, 1)))

    return convert


for _name, _function in {
    "add": relax.op.add,
    "sub": relax.op.subtract,
    "mul": relax.op.multiply,
    "div": relax.op.divide,
}.items():
    converts(f"{_name}.Tensor", f"{_name}.Scalar")(_arithmetic(_function))
converts("maximum.default")(_arithmetic(relax.op.maximum))
converts("minimum.default")(_arithmetic(relax.op.minimum))
converts("pow.Tensor_Tensor", "pow.Scalar")(_arithmetic(relax.op.power))


@converts("rsub.Tensor", "rsub.Scalar")
def _reverse_subtract(importer: Any, node: fx.Node) -> Any:
    """y - alpha x."""
    x, y = _pair(importer, node, 0)
    return importer.block_builder.emit(relax.op.subtract(y, x))


@converts("div.Tensor_mode")
def _divide(importer: Any, node: fx.Node) -> Any:
    """Division in torch's result type, then rounded down or towards zero."""
    emit = importer.block_builder.emit
    dtype = result_dtype(node)
    x, y = (operand(importer, value, dtype) for value in node.args[:2])
    mode = node.kwargs.get("rounding_mode")
    if mode == "floor":
        return emit(relax.op.floor_divide(x, y))
    quotient = emit(relax.op.divide(x, y))
    if mode is None or not dtype.startswith("float"):
        return quotient
    return emit(relax.op.trunc(quotient))


@converts("native_dropout.default")
def _native_dropout(importer: Any, node: fx.Node) -> Any:
    """Whether a step really drops is decided when it is differentiated."""
    x, p, training = importer.env[node.args[0]], float(node.args[1]), node.args[2]
    return (dropped(importer, x, p) if training and p > 0 else x, relax.op.ones_like(x))


@converts("cumsum.default")
def _cumsum(importer: Any, node: fx.Node) -> Any:
    x, emit = importer.env[node.args[0]], importer.block_builder.emit
    dtype = result_dtype(node)  # int64 for a bool, as torch has it
    if dtype_of(x) != dtype:
        x = emit(relax.op.astype(x, dtype))
    return emit(relax.op.cumsum(x, argument(node, 1, "dim"), dtype))
