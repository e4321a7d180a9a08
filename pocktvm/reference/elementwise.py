"""Operators of one element: unary, binary, where, and the gradients of activations."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F

from pocktvm.ir.graph import Node, Value
from pocktvm.reference.registry import Tensor, gradient_of, reference

UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "negative": torch.neg,
    "exp": torch.exp,
    "log": torch.log,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "abs": torch.abs,
    "sign": torch.sign,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "erf": torch.erf,
    "sin": torch.sin,
    "cos": torch.cos,
    "floor": torch.floor,
    "ceil": torch.ceil,
    "round": torch.round,
    "square": torch.square,
    "reciprocal": torch.reciprocal,
    "relu": F.relu,
    "relu6": F.relu6,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "logical_not": torch.logical_not,
    "copy": torch.clone,
}


def _divide(a: Tensor, b: Tensor) -> Tensor:
    # TVM truncates integer quotients; torch would return floats
    mode = None if a.is_floating_point() or b.is_floating_point() else "trunc"
    return torch.div(a, b, rounding_mode=mode)


BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "subtract": torch.sub,
    "multiply": torch.mul,
    "divide": _divide,
    "power": torch.pow,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "equal": torch.eq,
    "not_equal": torch.ne,
    "less": torch.lt,
    "less_equal": torch.le,
    "greater": torch.gt,
    "greater_equal": torch.ge,
    "logical_and": torch.logical_and,
    "logical_or": torch.logical_or,
    "floor_divide": torch.floor_divide,
    "mod": torch.remainder,
}


@reference(*UNARY)
def unary(node: Node, args: Sequence[Tensor], outs: Sequence[Value]) -> Tensor:
    """An operator of one operand, without attributes."""
    return UNARY[node.op](args[0])


@reference(*BINARY)
def binary(node: Node, args: Sequence[Tensor], outs: Sequence[Value]) -> Tensor:
    """Two operands, broadcast as numpy does."""
    return BINARY[node.op](args[0], args[1])


@reference("where")
def where(node: Node, args: Sequence[Tensor], outs: Sequence[Value]) -> Tensor:
    """y = a where cond else b."""
    return torch.where(args[0].bool(), args[1], args[2])


@reference("astype")
def astype(node: Node, args: Sequence[Tensor], outs: Sequence[Value]) -> Tensor:
    """The interpreter casts every result to its declared dtype; only float -> int rounds here."""
    to_int = args[0].is_floating_point() and outs[0].dtype.startswith(("int", "uint"))
    return args[0].trunc() if to_int else args[0]


@reference("pack_bf16")
def pack_bf16(node: Node, args: Sequence[Tensor], outs: Sequence[Value]) -> Tensor:
    """The bits of torch's own bfloat16."""
    return args[0].to(torch.bfloat16).view(torch.uint16)


@reference("unpack_bf16")
def unpack_bf16(node: Node, args: Sequence[Tensor], outs: Sequence[Value]) -> Tensor:
    """float32 from the bits of a bfloat16."""
    return args[0].view(torch.bfloat16).to(torch.float32)


@reference("pack_u8")
def pack_u8(node: Node, args: Sequence[Tensor], outs: Sequence[Value]) -> Tensor:
    """The nearest of 256 steps between 0 and top."""
    return (args[0] * (255.0 / node.attrs["top"])).round().clamp(0, 255)


@reference("unpack_u8")
def unpack_u8(node: Node, args: Sequence[Tensor], outs: Sequence[Value]) -> Tensor:
    """float32 of a step between 0 and `top`: the inverse of pack_u8."""
    return args[0].to(torch.float32) * (node.attrs["top"] / 255.0)


def pieces(extent: int, group: int) -> list[int]:
    """Sizes of the blocks of a row: whole ones, then 8, 4, 2, 1 of what is left."""
    rest = extent % group
    tail = [1 << i for i in reversed(range(group.bit_length())) if rest >> i & 1]
    return [group] * (extent // group) + tail


@reference("pack_i8")
def pack_i8(node: Node, args: Sequence[Tensor], outs: Sequence[Value]) -> tuple[Tensor, Tensor]:
    """Integers below 2**7 and the biased exponent of each block's largest magnitude."""
    codes, exponents = [], []
    for block in args[0].float().split(pieces(args[0].shape[-1], node.attrs["group"]), -1):
        bits = block.abs().amax(-1, keepdim=True).view(torch.int32)
        exponents.append((bits >> 23).clamp(min=8))
        codes.append(torch.ldexp(block, 133 - exponents[-1]).clamp(max=127).round())
    return torch.cat(codes, -1), torch.cat(exponents, -1)


@reference("unpack_i8")
def unpack_i8(node: Node, args: Sequence[Tensor], outs: Sequence[Value]) -> Tensor:
    """float32 from integers and exponents."""
    sizes = torch.tensor(pieces(outs[0].shape[-1], node.attrs["group"]))
    exponents = args[1].to(torch.int32).repeat_interleave(sizes, -1)
    return torch.ldexp(args[0].to(torch.float32), exponents - 133)


@reference("pack_mask")
def pack_mask(node: Node, args: Sequence[Tensor], outs: Sequence[Value]) -> Tensor:
    """One bit a channel, the lowest first; rows are filled up with zeros."""
    bits = passes(node, args[0])
    group = node.attrs["group"]
    bits = F.pad(bits.to(torch.uint8), (0, -bits.shape[-1] % group))
    bits = bits.reshape(*bits.shape[:-1], -1, group)
    return (bits * 2 ** torch.arange(group, dtype=torch.uint8)).sum(-1)


@reference("apply_mask")
def apply_mask(node: Node, args: Sequence[Tensor], outs: Sequence[Value]) -> Tensor:
    """dout where the bit is set."""
    dout, masks = args
    group = node.attrs["group"]
    bits = masks.unsqueeze(-1) >> torch.arange(group, dtype=torch.uint8) & 1
    bits = bits.flatten(-2)[..., : outs[0].shape[-1]]
    return torch.where(bits.bool(), dout, torch.zeros((), dtype=dout.dtype))


def passes(node: Node, y: Tensor) -> Tensor:
    """Where the gradient of ReLU, ReLU6 (of their output) or a clip (of its input) is not zero."""
    if node.attrs["test"] == "relu":
        return y > 0
    if node.attrs["test"] == "relu6":
        return (y > 0) & (y < 6)
    inside = torch.ones_like(y, dtype=torch.bool)
    if (low := node.attrs.get("min")) is not None:
        inside &= y >= low
    if (high := node.attrs.get("max")) is not None:
        inside &= y <= high
    return inside


def with_attributes(op: str, node: Node) -> Callable[[Tensor], Tensor]:
    """The forward function of a unary operator that takes attributes."""
    attrs = node.attrs
    if op == "clip":
        low, high = attrs.get("min"), attrs.get("max")
        return lambda x: x if low is None and high is None else torch.clamp(x, low, high)
    if op == "leakyrelu":
        return lambda x: F.leaky_relu(x, attrs.get("alpha", 0.01))
    if op == "elu":
        return lambda x: F.elu(x, attrs.get("alpha", 1.0))
    if op == "softplus":
        return lambda x: F.softplus(x, attrs.get("beta", 1.0), attrs.get("threshold", 20.0))
    return UNARY[op]


@reference("clip", "leakyrelu", "elu", "softplus")
def parametric(node: Node, args: Sequence[Tensor], outs: Sequence[Value]) -> Tensor:
    """An operator of one operand, with attributes."""
    return with_attributes(node.op, node)(args[0])


@reference("relu_grad", "relu6_grad", "sigmoid_grad", "tanh_grad")
def from_output(node: Node, args: Sequence[Tensor], outs: Sequence[Value]) -> Tensor:
    """dx from dout and the forward's output y."""
    dout, y = args
    zero = torch.zeros((), dtype=dout.dtype)
    if node.op == "relu_grad":
        return torch.where(y > 0, dout, zero)
    if node.op == "relu6_grad":
        return torch.where((y > 0) & (y < 6), dout, zero)
    return dout * (y * (1 - y) if node.op == "sigmoid_grad" else 1 - y * y)


@reference(
    "clip_grad",
    "gelu_grad",
    "gelu_tanh_grad",
    "silu_grad",
    "softplus_grad",
    "hardswish_grad",
    "hardsigmoid_grad",
    "leakyrelu_grad",
    "elu_grad",
)
def from_input(node: Node, args: Sequence[Tensor], outs: Sequence[Value]) -> Tensor:
    """dx from dout and the forward's input x, by torch's autograd."""
    dout, x = torch.broadcast_tensors(*args)
    return gradient_of(with_attributes(node.op.removesuffix("_grad"), node), x, dout)
