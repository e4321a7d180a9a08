"""Normalisation: batch norm becomes scale and shift, layer and RMS norm keep their statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pocktvm.autodiff.lowering.registry import axes_of, lower
from pocktvm.autodiff.ops import Emitter, Expr, constant, plain, scalar_value, shape_of


def channels(x: Expr, axis: int, rank: int, e: Emitter) -> Expr:
    """A vector along `axis` of a tensor of `rank`."""
    return e.reshape(x, [shape_of(x)[0] if i == axis else 1 for i in range(rank)])


@lower("relax.nn.batch_norm")
def batch_norm(call: Any, args: Sequence[Expr], e: Emitter) -> tuple[Expr, ...]:
    """y = x * scale + shift with the stored statistics.

    scale = gamma * rsqrt(var + eps) and shift = beta - mean * scale are [C] computations: constants
    where gamma and beta are frozen, and the gradients of gamma and beta fall out of them.
    """
    x, gamma, beta, mean, var = args
    rank, axis = len(shape_of(x)), int(call.attrs.axis)
    if plain(call.attrs.scale) is False:
        gamma = constant(np.ones(shape_of(gamma), "float32"))
    if plain(call.attrs.center) is False:
        beta = constant(np.zeros(shape_of(beta), "float32"))
    scale = e.multiply(gamma, e.unary("rsqrt", e.add(var, float(call.attrs.epsilon))))
    shift = e.subtract(beta, e.multiply(mean, scale))
    scaled = e.multiply(x, channels(scale, axis, rank, e))
    return e.add(scaled, channels(shift, axis, rank, e)), mean, var


@lower("relax.nn.layer_norm")
def layer_norm(call: Any, args: Sequence[Expr], e: Emitter) -> Expr:
    """One operator that also gives the rows' mean and 1/std, which its gradient reads."""
    x, gamma, beta = args
    shape = shape_of(x)
    axes = axes_of(plain(call.attrs.axes), len(shape))
    if axes != tuple(range(len(shape) - len(axes), len(shape))):
        y = _normalised(x, axes, float(call.attrs.epsilon), e)
        unit = [shape[i] if i in axes else 1 for i in range(len(shape))]
        return e.add(e.multiply(y, e.reshape(gamma, unit)), e.reshape(beta, unit))
    rows = shape[: len(shape) - len(axes)]
    attrs = {"axes": axes, "eps": float(call.attrs.epsilon)}
    return e.many("layer_norm", x, gamma, beta, shapes=[shape, rows, rows], **attrs)[0]


@lower("relax.nn.rms_norm")
def rms_norm(call: Any, args: Sequence[Expr], e: Emitter) -> Expr:
    """x * rsqrt(mean(x²) + eps) * gamma."""
    axes = axes_of(plain(call.attrs.axes), len(shape_of(args[0])))
    return emit_rms_norm(args[0], args[1], axes, float(call.attrs.epsilon), e)


def emit_rms_norm(x: Expr, gamma: Expr, axes: Sequence[int], eps: float, e: Emitter) -> Expr:
    """Our operator; `axes` are the last ones."""
    shape = shape_of(x)
    rows = shape[: len(shape) - len(axes)]
    attrs = {"axes": tuple(axes), "eps": eps}
    return e.many("rms_norm", x, gamma, shapes=[shape, rows], **attrs)[0]


def match_rms_norm(a: Expr, b: Expr, e: Emitter) -> Expr | None:
    """rms_norm when one operand is gamma, the other x * rsqrt(mean(x * x, last) + eps)."""
    for gamma, y in ((a, b), (b, a)):
        found = _unit_rms(y, e)
        if found is not None and shape_of(gamma) == shape_of(y)[-1:]:
            x, eps = found
            return emit_rms_norm(x, gamma, (len(shape_of(x)) - 1,), eps, e)
    return None


def _unit_rms(y: Expr, e: Emitter) -> tuple[Expr, float] | None:
    """(x, eps) when y is x * rsqrt(mean(x²) + eps)."""
    product = e.call_of(y, "multiply")
    if product is None:
        return None
    for x, other in (tuple(product.args), tuple(product.args)[::-1]):
        root = e.call_of(other, "rsqrt")
        total = root and e.call_of(root.args[0], "add")
        if not total:
            continue
        eps, mean = scalar_value(total.args[1]), e.call_of(total.args[0], "mean")
        square = mean and e.call_of(mean.args[0], "square", "multiply")
        if eps is None or not mean or not square or not all(s.same_as(x) for s in square.args):
            continue
        if mean.attrs["axes"] == (len(shape_of(x)) - 1,):
            return x, eps
    return None


def _normalised(x: Expr, axes: Sequence[int], eps: float, e: Emitter) -> Expr:
    """(x - mean) / sqrt(var + eps), spelt out."""
    centred = e.subtract(x, e.reduce("mean", x, axes, keepdims=True))
    var = e.reduce("mean", e.unary("square", centred), axes, keepdims=True)
    return e.multiply(centred, e.unary("rsqrt", e.add(var, eps)))


@lower("relax.nn.group_norm")
def group_norm(call: Any, args: Sequence[Expr], e: Emitter) -> Expr:
    """Rows of [N, groups, rest] normalised, then gamma and beta per channel."""
    x, gamma, beta = args
    shape, axis = shape_of(x), int(call.attrs.channel_axis) % len(shape_of(x))
    groups = int(call.attrs.num_groups)
    rows = e.reshape(x, (shape[0], groups, int(np.prod(shape[1:])) // groups))
    y = e.reshape(_normalised(rows, (2,), float(call.attrs.epsilon), e), shape)
    y = e.multiply(y, channels(gamma, axis, len(shape), e))
    return e.add(y, channels(beta, axis, len(shape), e))


@lower("relax.nn.instance_norm")
def instance_norm(call: Any, args: Sequence[Expr], e: Emitter) -> Expr:
    """Every channel of every sample normalised over space."""
    x, gamma, beta = args
    rank, axis = len(shape_of(x)), int(call.attrs.channel_axis) % len(shape_of(x))
    axes = axes_of(plain(call.attrs.axes), rank)
    y = _normalised(x, axes, float(call.attrs.epsilon), e)
    y = e.multiply(y, channels(gamma, axis, rank, e))
    return e.add(y, channels(beta, axis, rank, e))
