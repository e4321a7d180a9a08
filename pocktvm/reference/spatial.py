"""Pooling and resizing, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F

from pocktvm.ir.graph import Node, Value
from pocktvm.reference.linear import from_nchw, nchw_shape, sides, to_nchw
from pocktvm.reference.registry import Tensor, gradient_of, reference


def _window(node: Node) -> dict[str, tuple[int, ...]]:
    attrs = node.attrs
    return {
        "stride": tuple(attrs.get("strides", (1, 1))),
        "dilation": tuple(attrs.get("dilation", (1, 1))),
    }


def _max_pool(node: Node) -> Callable[[Tensor], Tensor]:
    padding = sides(node.attrs.get("padding", (0, 0, 0, 0)))

    def forward(x: Tensor) -> Tensor:
        padded = F.pad(x, padding, value=-torch.inf).contiguous()
        return F.max_pool2d(padded, tuple(node.attrs["pool"]), **_window(node))  # type: ignore[call-overload]

    return forward


def _avg_pool(node: Node) -> Callable[[Tensor], Tensor]:
    """Sums by a convolution with ones, so that unequal padding and dilation need no other path."""
    kh, kw = node.attrs["pool"]
    padding = sides(node.attrs.get("padding", (0, 0, 0, 0)))

    def total(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        rows = F.pad(x.reshape(n * c, 1, h, w), padding)
        y = F.conv2d(rows, torch.ones(1, 1, kh, kw, dtype=x.dtype), **_window(node))  # type: ignore[arg-type]
        return y.reshape(n, c, *y.shape[2:])

    def forward(x: Tensor) -> Tensor:
        if node.attrs.get("count_include_pad", False):
            return total(x) / (kh * kw)
        return total(x) / total(torch.ones_like(x[:1, :1]))

    return forward


def _resize(node: Node, size: Sequence[int]) -> Callable[[Tensor], Tensor]:
    if node.attrs.get("method", "nearest").startswith("nearest"):
        return lambda x: F.interpolate(x, tuple(size), mode="nearest")
    corners = bool(node.attrs.get("align_corners", False))
    return lambda x: F.interpolate(x, tuple(size), mode="bilinear", align_corners=corners)


@reference("max_pool2d", "avg_pool2d", "resize2d")
def forward(node: Node, args: Sequence[Tensor], outs: Sequence[Value]) -> Tensor:
    """Pooling and resizing, forward."""
    layout = node.attrs.get("layout", "NCHW")
    x = to_nchw(args[0], layout)
    if node.op == "resize2d":
        function = _resize(node, nchw_shape(outs[0], layout)[2:])
    else:
        function = _max_pool(node) if node.op == "max_pool2d" else _avg_pool(node)
    return from_nchw(function(x), layout)


@reference("max_pool2d_indexed")
def indexed(node: Node, args: Sequence[Tensor], outs: Sequence[Value]) -> tuple[Tensor, Tensor]:
    """The maxima, and the tap of each window that holds the first of them."""
    layout = node.attrs.get("layout", "NCHW")
    padding = sides(node.attrs.get("padding", (0, 0, 0, 0)))
    padded = F.pad(to_nchw(args[0], layout), padding, value=-torch.inf).contiguous()
    pool, window = tuple(node.attrs["pool"]), _window(node)
    y, flat = F.max_pool2d(padded, pool, return_indices=True, **window)  # type: ignore[call-overload]
    taps = []
    for axis, at in enumerate((flat // padded.shape[3], flat % padded.shape[3])):
        shape = (-1, 1) if axis == 0 else (1, -1)
        first = torch.arange(y.shape[2 + axis]).reshape(shape) * window["stride"][axis]
        taps.append((at - first) // window["dilation"][axis])
    return from_nchw(y, layout), from_nchw(taps[0] * pool[1] + taps[1], layout)


@reference("max_pool2d_scatter")
def scatter(node: Node, args: Sequence[Tensor], outs: Sequence[Value]) -> Tensor:
    """dy to the taps, added where windows meet: the gradient of picking one tap of each window."""
    layout = node.attrs.get("layout", "NCHW")
    dy, places = (to_nchw(a, layout) for a in args)
    n, c, h, w = nchw_shape(outs[0], layout)
    left, right, top, bottom = sides(node.attrs.get("padding", (0, 0, 0, 0)))
    window, (kh, kw) = _window(node), node.attrs["pool"]
    unfold = {"dilation": window["dilation"], "stride": window["stride"]}

    def picked(x: Tensor) -> Tensor:
        padded = F.pad(x, (left, right, top, bottom)).reshape(n * c, 1, h + top + bottom, -1)
        columns = F.unfold(padded, (kh, kw), **unfold)  # type: ignore[arg-type]
        at = places.reshape(n * c, 1, -1).long()
        return columns.gather(1, at).reshape(dy.shape)

    return from_nchw(gradient_of(picked, torch.zeros(n, c, h, w, dtype=dy.dtype), dy), layout)


@reference("max_pool2d_grad", "avg_pool2d_grad", "resize2d_grad")
def backward(node: Node, args: Sequence[Tensor], outs: Sequence[Value]) -> Tensor:
    """The input's gradient; only the maximum needs x, the others are linear."""
    layout = node.attrs.get("layout", "NCHW")
    dy = to_nchw(args[0], layout)
    if node.op == "max_pool2d_grad":
        return from_nchw(gradient_of(_max_pool(node), to_nchw(args[1], layout), dy), layout)
    at = torch.zeros(nchw_shape(outs[0], layout), dtype=dy.dtype)
    function = _avg_pool(node) if node.op == "avg_pool2d_grad" else _resize(node, dy.shape[2:])
    return from_nchw(gradient_of(function, at, dy), layout)
