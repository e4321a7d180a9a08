"""Pooling and resizing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pocktvm.autodiff.lowering.linear import high, sides
from pocktvm.autodiff.lowering.registry import lower
from pocktvm.autodiff.ops import Emitter, Expr, plain, shape_of
from pocktvm.errors import PockError


def _window(call: Any, x: Expr) -> dict[str, Any]:
    """Our attributes of a pool; ceil mode becomes padding at the bottom and the right."""
    attrs = call.attrs
    pool, strides, dilation = (plain(v) for v in (attrs.pool_size, attrs.strides, attrs.dilation))
    padding = plain(attrs.padding)
    if len(pool) == 1:
        left, right = padding if len(padding) == 2 else padding * 2
        padding = (0, left, 0, right)
        pool, strides, dilation = (1, *pool), (1, *strides), (1, *dilation)
    top, left, bottom, right = sides(padding)
    size, out = high(shape_of(x))[2:], high(shape_of(call))[2:]
    ends = [
        max(end, (o - 1) * s + (k - 1) * d + 1 - n - begin)
        for o, s, k, d, n, begin, end in zip(
            out, strides, pool, dilation, size, (top, left), (bottom, right), strict=True
        )
    ]
    return {
        "pool": pool,
        "strides": strides,
        "padding": (top, left, *ends),
        "dilation": dilation,
        "layout": "NCHW",
    }


@lower("relax.nn.max_pool2d", "relax.nn.max_pool1d")
def max_pool(call: Any, args: Sequence[Expr], e: Emitter) -> Expr:
    """The largest of each window; padding never wins."""
    x = e.reshape(args[0], high(shape_of(args[0])))
    y = e.op("max_pool2d", x, shape=high(shape_of(call)), **_window(call, args[0]))
    return e.reshape(y, shape_of(call))


@lower("relax.nn.avg_pool2d", "relax.nn.avg_pool1d")
def avg_pool(call: Any, args: Sequence[Expr], e: Emitter) -> Expr:
    """The mean of each window, with or without the padding in the count."""
    x, attrs = e.reshape(args[0], high(shape_of(args[0]))), _window(call, args[0])
    given = sides(plain(call.attrs.padding)) if len(shape_of(args[0])) == 4 else None
    include = bool(call.attrs.count_include_pad)
    grown = bool(call.attrs.ceil_mode) and attrs["padding"] != given
    if include and grown and any(plain(call.attrs.padding)):
        raise PockError(
            f"avg_pool of layer '{e.layer}' has ceil_mode with padding and count_include_pad; "
            "pad the input explicitly, or set count_include_pad=False."
        )
    attrs["count_include_pad"] = include and not grown
    y = e.op("avg_pool2d", x, shape=high(shape_of(call)), **attrs)
    return e.reshape(y, shape_of(call))


@lower("relax.nn.adaptive_avg_pool2d", "relax.nn.adaptive_avg_pool1d")
def adaptive_avg_pool(call: Any, args: Sequence[Expr], e: Emitter) -> Expr:
    """A mean over all of space, or over equal windows; unequal ones are averaged one by one."""
    x = e.reshape(args[0], high(shape_of(args[0])))
    size, out = shape_of(x)[2:], high(shape_of(call))[2:]
    if out == (1, 1):
        return e.reshape(e.reduce("mean", x, (2, 3), keepdims=True), shape_of(call))
    if all(n % o == 0 for n, o in zip(size, out, strict=True)):
        pool = tuple(n // o for n, o in zip(size, out, strict=True))
        attrs: dict[str, Any] = {"pool": pool, "strides": pool, "dilation": (1, 1)}
        attrs |= {"padding": (0, 0, 0, 0)}
        attrs |= {"layout": "NCHW", "count_include_pad": False}
        y = e.op("avg_pool2d", x, shape=(*shape_of(x)[:2], *out), **attrs)
        return e.reshape(y, shape_of(call))
    for axis in (2, 3):
        x = _adaptive_axis(x, axis, out[axis - 2], e)
    return e.reshape(x, shape_of(call))


def _adaptive_axis(x: Expr, axis: int, out: int, e: Emitter) -> Expr:
    """Means of [floor(i*n/o), ceil((i+1)*n/o)) along one axis."""
    n = shape_of(x)[axis]
    if n == out:
        return x
    parts = [
        e.reduce(
            "mean", e.narrow_axis(x, axis, i * n // out, -(-(i + 1) * n // out)), (axis,), True
        )
        for i in range(out)
    ]
    return e.concat(parts, axis)


@lower("relax.image.resize2d")
def resize2d(call: Any, args: Sequence[Expr], e: Emitter) -> Expr:
    """Upsampling as torch does it: nearest, or bilinear with either corner convention."""
    method = str(call.attrs.method)
    mode = str(call.attrs.coordinate_transformation_mode)
    if method not in ("nearest_neighbor", "linear") or str(call.attrs.layout) != "NCHW":
        raise PockError(
            f"upsampling of layer '{e.layer}' by '{method}'; pocktvm has nearest and bilinear."
        )
    attrs: dict[str, Any] = {
        "method": "linear" if method == "linear" else "nearest",
        "layout": "NCHW",
    }
    attrs["align_corners"] = mode == "align_corners"
    return e.op("resize2d", args[0], shape=shape_of(call), **attrs)
