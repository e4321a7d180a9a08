"""Operators over rows: softmax, normalisation, cross-entropy, reductions, scans."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from pocktvm.ir.graph import Node, Value
from pocktvm.reference.registry import Tensor, gradient_of, reference


@reference("softmax", "log_softmax")
def softmax(node: Node, args: Sequence[Tensor], outs: Sequence[Value]) -> Tensor:
    """softmax along `axis`."""
    function = torch.softmax if node.op == "softmax" else torch.log_softmax
    x = args[0]
    if node.attrs.get("causal"):
        x = x.masked_fill(_above(x), float("-inf"))
    return function(x, dim=node.attrs.get("axis", -1))


def _above(x: Tensor) -> Tensor:
    """True above the diagonal of the last two axes."""
    return torch.ones(x.shape[-2:], dtype=torch.bool).triu(1)


@reference("softmax_grad", "log_softmax_grad")
def softmax_grad(node: Node, args: Sequence[Tensor], outs: Sequence[Value]) -> Tensor:
    """dx from dy and the forward's output y."""
    dy, y = args
    axis = node.attrs.get("axis", -1)
    if node.attrs.get("causal"):
        dy = dy.masked_fill(_above(dy), 0.0)
    if node.op == "softmax_grad":
        return y * (dy - (dy * y).sum(axis, keepdim=True))
    return dy - y.exp() * dy.sum(axis, keepdim=True)


def _axes(node: Node, rank: int) -> tuple[int, ...]:
    axes = node.attrs.get("axes")
    return tuple(range(rank)) if axes is None else tuple(axes)


def _rows(statistic: Tensor, x: Tensor, axes: Sequence[int]) -> Tensor:
    """A statistic of whatever declared shape, as x's shape with ones at `axes`."""
    return statistic.reshape([1 if i in axes else d for i, d in enumerate(x.shape)])


@reference("layer_norm")
def layer_norm(node: Node, args: Sequence[Tensor], outs: Sequence[Value]) -> tuple[Tensor, ...]:
    """y, mean, rstd (biased variance, as torch)."""
    x, g, b = args
    axes = _axes(node, x.ndim)
    mean = x.mean(axes, keepdim=True)
    rstd = torch.rsqrt(x.var(axes, unbiased=False, keepdim=True) + node.attrs.get("eps", 1e-5))
    results = ((x - mean) * rstd * g + b, mean, rstd)
    return tuple(r.reshape(o.shape) for r, o in zip(results, outs, strict=False))


@reference("layer_norm_grad")
def layer_norm_grad(node: Node, args: Sequence[Tensor], outs: Sequence[Value]) -> Tensor:
    """dx = rstd * (d - mean(d) - xhat * mean(d * xhat)), d = dy * g."""
    dy, x, g, mean, rstd = args
    axes = _axes(node, x.ndim)
    mean, rstd = _rows(mean, x, axes), _rows(rstd, x, axes)
    xhat, d = (x - mean) * rstd, dy * g
    spread = xhat * (d * xhat).mean(axes, keepdim=True)
    return rstd * (d - d.mean(axes, keepdim=True) - spread)


@reference("rms_norm")
def rms_norm(node: Node, args: Sequence[Tensor], outs: Sequence[Value]) -> tuple[Tensor, ...]:
    """(y, rstd): x over its root mean square, times g."""
    x, g = args
    axes = _axes(node, x.ndim)
    rstd = torch.rsqrt(x.square().mean(axes, keepdim=True) + node.attrs.get("eps", 1e-6))
    return tuple(r.reshape(o.shape) for r, o in zip((x * rstd * g, rstd), outs, strict=False))


@reference("rms_norm_grad")
def rms_norm_grad(node: Node, args: Sequence[Tensor], outs: Sequence[Value]) -> Tensor:
    """dx = rstd * (d - xhat * mean(d * xhat)), d = dy * g."""
    dy, x, g, rstd = args
    axes = _axes(node, x.ndim)
    rstd = _rows(rstd, x, axes)
    xhat, d = x * rstd, dy * g
    return rstd * (d - xhat * (d * xhat).mean(axes, keepdim=True))


def _cross_entropy(node: Node, logits: Tensor, y: Tensor, weight: Tensor | None) -> Tensor:
    axis = node.attrs.get("axis", 1 if logits.ndim > 1 else 0) % logits.ndim
    to = 1 if logits.ndim > 1 else 0
    soft = y.is_floating_point()
    return F.cross_entropy(
        logits.movedim(axis, to),
        y.movedim(axis, to) if soft else y.long(),
        weight=weight,
        ignore_index=-100 if soft else _ignored(node),
        label_smoothing=node.attrs.get("label_smoothing", 0.0),
        reduction=node.attrs.get("reduction", "mean"),
    )


def _ignored(node: Node) -> int:
    index = node.attrs.get("ignore_index")
    return -100 if index is None else int(index)


@reference("cross_entropy")
def cross_entropy(node: Node, args: Sequence[Tensor], outs: Sequence[Value]) -> Tensor:
    """torch's mean cross-entropy; y holds classes, or probabilities when it is floating."""
    return _cross_entropy(node, args[0], args[1], args[2] if len(args) > 2 else None)


@reference("cross_entropy_grad")
def cross_entropy_grad(
    node: Node, args: Sequence[Tensor], outs: Sequence[Value]
) -> tuple[Tensor, ...]:
    """dlogits, by torch's autograd, and the loss where it is wanted."""
    logits, y, dloss = args[:3]
    weight = args[3] if len(args) > 3 else None
    grad = gradient_of(lambda x: _cross_entropy(node, x, y, weight), logits, dloss.reshape(()))
    return (grad, _cross_entropy(node, logits, y, weight))[: len(outs)]


@reference("sum", "mean", "max", "min")
def reduce(node: Node, args: Sequence[Tensor], outs: Sequence[Value]) -> Tensor:
    """Over `axes` (all of them when absent)."""
    function = {"sum": torch.sum, "mean": torch.mean, "max": torch.amax, "min": torch.amin}[node.op]
    x, axes = args[0], _axes(node, args[0].ndim)
    return function(x, dim=axes, keepdim=bool(node.attrs.get("keepdims", False))) if axes else x


@reference("prod")
def prod(node: Node, args: Sequence[Tensor], outs: Sequence[Value]) -> Tensor:
    """torch multiplies along one axis at a time."""
    y = args[0]
    for axis in sorted(_axes(node, y.ndim), reverse=True):
        y = y.prod(axis, keepdim=bool(node.attrs.get("keepdims", False)))
    return y


@reference("argmax")
def argmax(node: Node, args: Sequence[Tensor], outs: Sequence[Value]) -> Tensor:
    """The first maximum along `axis`."""
    keep = bool(node.attrs.get("keepdims", False))
    return torch.argmax(args[0], dim=node.attrs.get("axis"), keepdim=keep).reshape(outs[0].shape)


@reference("cumsum")
def cumsum(node: Node, args: Sequence[Tensor], outs: Sequence[Value]) -> Tensor:
    """Along `axis` (a flattened tensor when absent)."""
    axis, x = node.attrs.get("axis"), args[0]
    x, axis = (x.reshape(-1), 0) if axis is None else (x, axis)
    if outs[0].dtype.startswith("int"):
        x = x.long()
    x = x.flip(axis) if node.attrs.get("reverse") else x
    y = torch.cumsum(x, axis)
    y = y - x if node.attrs.get("exclusive") else y
    return y.flip(axis) if node.attrs.get("reverse") else y
