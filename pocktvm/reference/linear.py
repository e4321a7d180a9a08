"""Matrix products and convolutions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from pocktvm.ir.graph import Node, Value
from pocktvm.reference.registry import Tensor, reference


@reference("matmul")
def matmul(node: Node, args: Sequence[Tensor], outs: Sequence[Value]) -> Tensor:
    """numpy's matmul after transposing the last two axes where asked."""
    a, b = args
    a = a.mT if node.attrs.get("transpose_a") else a
    b = b.mT if node.attrs.get("transpose_b") else b
    c = torch.matmul(a, b)
    if node.attrs.get("causal") == "result":  # whoever reads it shows
        above = torch.ones(c.shape[-2:], dtype=torch.bool).triu(1)
        return c.masked_fill(above, float("nan"))
    return c


def to_nchw(x: Tensor, layout: str) -> Tensor:
    """Activations as torch wants them."""
    return x.permute(0, 3, 1, 2) if layout == "NHWC" else x


def from_nchw(x: Tensor, layout: str) -> Tensor:
    """The inverse of to_nchw."""
    return x.permute(0, 2, 3, 1) if layout == "NHWC" else x


def to_oihw(w: Tensor, layout: str) -> Tensor:
    """Weights as torch wants them; NHWC comes with HWIO."""
    return w.permute(3, 2, 0, 1) if layout == "NHWC" else w


def from_oihw(w: Tensor, layout: str) -> Tensor:
    """The inverse of to_oihw."""
    return w.permute(2, 3, 1, 0) if layout == "NHWC" else w


def sides(padding: Sequence[int]) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) as F.pad's (left, right, top, bottom)."""
    top, left, bottom, right = padding
    return left, right, top, bottom


def nchw_shape(out: Value, layout: str) -> list[int]:
    """The NCHW shape of an activation."""
    n, *rest = out.shape
    return [n, rest[2], rest[0], rest[1]] if layout == "NHWC" else [n, *rest]


def oihw_shape(out: Value, layout: str) -> list[int]:
    """The OIHW shape of a weight."""
    a, b, c, d = out.shape
    return [d, c, a, b] if layout == "NHWC" else [a, b, c, d]


def _geometry(node: Node) -> dict[str, object]:
    attrs = node.attrs
    return {
        "stride": tuple(attrs.get("strides", (1, 1))),
        "padding": 0,
        "dilation": tuple(attrs.get("dilation", (1, 1))),
        "groups": attrs.get("groups", 1),
    }


def _layout(node: Node) -> str:
    return str(node.attrs.get("layout", "NCHW"))


def _padding(node: Node) -> tuple[int, int, int, int]:
    return sides(node.attrs.get("padding", (0, 0, 0, 0)))


# Padding is applied apart from the convolution, so that unequal sides need no second path.


def _pad(x: Tensor, padding: Sequence[int]) -> Tensor:
    return F.pad(x, list(padding)) if any(padding) else x  # a pad by nothing would copy


@reference("conv2d")
def conv2d(node: Node, args: Sequence[Tensor], outs: Sequence[Value]) -> Tensor:
    """y = conv(pad(x), w)."""
    layout = _layout(node)
    x = _pad(to_nchw(args[0], layout), _padding(node))
    y = F.conv2d(x, to_oihw(args[1], layout), **_geometry(node))  # type: ignore[arg-type]
    return from_nchw(y, layout)


@reference("conv2d_input_grad")
def conv2d_input_grad(node: Node, args: Sequence[Tensor], outs: Sequence[Value]) -> Tensor:
    """dx = crop(the padded input's gradient)."""
    layout, padding = _layout(node), _padding(node)
    n, c, h, w = nchw_shape(outs[0], layout)
    padded = [n, c, h + padding[2] + padding[3], w + padding[0] + padding[1]]
    dx = torch.nn.grad.conv2d_input(
        padded,
        to_oihw(args[1], layout),
        to_nchw(args[0], layout),
        **_geometry(node),  # type: ignore[arg-type]
    )
    return from_nchw(_pad(dx, [-p for p in padding]), layout)


@reference("conv2d_weight_grad")
def conv2d_weight_grad(node: Node, args: Sequence[Tensor], outs: Sequence[Value]) -> Tensor:
    """dw from the padded input and dy."""
    layout = _layout(node)
    dw = torch.nn.grad.conv2d_weight(
        _pad(to_nchw(args[0], layout), _padding(node)),
        oihw_shape(outs[0], layout),
        to_nchw(args[1], layout),
        **_geometry(node),  # type: ignore[arg-type]
    )
    return from_oihw(dw, layout)
