"""Rules of simplify for arithmetic with constants: exact up to one rounding."""

from __future__ import annotations

import numpy as np

from pocktvm.ir.graph import Node
from pocktvm.passes.simplify import Simplifier, rule

NEUTRAL = {"add": 0.0, "subtract": 0.0, "multiply": 1.0, "divide": 1.0, "power": 1.0}


@rule("add", "subtract", "multiply", "divide", "power")
def drop_neutral(ed: Simplifier, node: Node) -> str | None:
    """x + 0, x - 0, x * 1, x / 1, x ** 1; the sum and the product from either side."""
    out = ed.values[node.outputs[0]]
    sides = [(0, 1), (1, 0)] if node.op in ("add", "multiply") else [(0, 1)]
    for keep, number in sides:
        x = ed.values[node.inputs[keep]]
        same = (tuple(x.shape), x.dtype) == (tuple(out.shape), out.dtype)
        if same and ed.is_all(node.inputs[number], NEUTRAL[node.op]):
            return node.inputs[keep]
    return None


@rule("negative")
def double_negative(ed: Simplifier, node: Node) -> str | None:
    """-(-x) is x."""
    inner = ed.made_by(node.inputs[0], "negative")
    return inner.inputs[0] if inner else None


@rule("add", "subtract")
def sum_of_negative(ed: Simplifier, node: Node) -> str | None:
    """a + (-b) is a - b; a - (-b) is a + b."""
    out = ed.values[node.outputs[0]]
    a, b = node.inputs
    if inner := ed.made_by(b, "negative"):
        other = "subtract" if node.op == "add" else "add"
        return ed.make(other, (a, inner.inputs[0]), out, node.layer)
    if node.op == "add" and (inner := ed.made_by(a, "negative")):
        return ed.make("subtract", (b, inner.inputs[0]), out, node.layer)
    return None


@rule("add", "multiply")
def constant_last(ed: Simplifier, node: Node) -> str | None:
    """The constant is the second operand: one form for the rules below and for equal values."""
    a, b = node.inputs
    if a in ed.consts and b not in ed.consts:
        return ed.make(node.op, (b, a), ed.values[node.outputs[0]], node.layer, **node.attrs)
    return None


@rule("add", "multiply")
def merge_constants(ed: Simplifier, node: Node) -> str | None:
    """(x + c) + d is x + (c + d), likewise for products: shifts and scales of a channel combine."""
    x, d = node.inputs
    inner = ed.made_by(x, node.op)
    if inner is None or not ed.only_use(x):
        return None
    c_array, d_array = ed.small_const(inner.inputs[1]), ed.small_const(d)
    if c_array is None or d_array is None or not np.issubdtype(c_array.dtype, np.floating):
        return None
    combine = np.add if node.op == "add" else np.multiply
    merged = combine(c_array.astype(np.float64), d_array.astype(np.float64)).astype(np.float32)
    if merged.size > max(c_array.size, d_array.size):
        return None  # [C,1] and [1,W] would make a tensor of their product
    out = ed.values[node.outputs[0]]
    const = ed.const(merged, d if d_array.size >= c_array.size else inner.inputs[1])
    return ed.make(node.op, (inner.inputs[0], const), out, node.layer)


@rule("divide")
def divide_by_constant(ed: Simplifier, node: Node) -> str | None:
    """x / c is x * (1 / c): a division costs ten multiplications."""
    c = ed.small_const(node.inputs[1])
    if c is None or not np.issubdtype(c.dtype, np.floating) or node.inputs[0] in ed.consts:
        return None
    if not np.all(np.isfinite(c)) or np.any(c == 0):
        return None
    const = ed.const((1.0 / c.astype(np.float64)).astype(np.float32), "scalar")
    out = ed.values[node.outputs[0]]
    return ed.make("multiply", (node.inputs[0], const), out, node.layer)
