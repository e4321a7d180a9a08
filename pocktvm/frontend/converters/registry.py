"""Where converters register, and what they share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import fx

from pocktvm.registry import entry
from pocktvm.tvm_api import relax

# (importer, node) -> a Relax expression, or a tuple of them for an operator with several results
Converter = Callable[[Any, fx.Node], Any]
CONVERTERS: dict[str, Converter] = {}


def converts(*names: str) -> Callable[[Converter], Converter]:
    """Register a converter for operators, by the names torch.export gives them."""
    return entry(CONVERTERS, *names)


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """An operator's argument, given by position or by name."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def shape_of(expr: Any) -> list[int]:
    """The static shape of a Relax expression."""
    return [int(d) for d in expr.ty.shape.values]


def dtype_of(expr: Any) -> str:
    """The element type of a Relax expression."""
    return str(getattr(expr.ty.dtype, "dtype", expr.ty.dtype))


def const(value: Any, dtype: str) -> Any:
    """A Relax constant of this dtype."""
    return relax.const(np.asarray(value, dtype), dtype)


def dropped(importer: Any, x: Any, p: float) -> Any:
    """x behind Relax's dropout, whose mask nobody reads."""
    pair = importer.block_builder.emit(relax.op.nn.dropout(x, p))
    return importer.block_builder.emit(relax.TupleGetItem(pair, 0))


def pair(value: Any) -> list[int]:
    """A number or a list of one or two as two numbers."""
    values = [int(v) for v in value] if isinstance(value, list | tuple) else [int(value)]
    return values * 2 if len(values) == 1 else values


def result_dtype(node: fx.Node) -> str:
    """The element type torch gives the node's result."""
    return str(node.meta["val"].dtype).removeprefix("torch.")


def operand(importer: Any, value: Any, dtype: str) -> Any:
    """A number or a node as a Relax expression of the given element type."""
    if not isinstance(value, fx.Node):
        return const(value, dtype)
    expr = importer.env[value]
    same = dtype_of(expr) == dtype
    return expr if same else importer.block_builder.emit(relax.op.astype(expr, dtype))
