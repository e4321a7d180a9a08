"""Operators that only move elements: views are reshapes, the rest slices, concats, broadcasts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pocktvm.autodiff.lowering.registry import lower
from pocktvm.autodiff.ops import Emitter, Expr, constant, dtype_of, plain, shape_of


@lower("relax.reshape", "relax.expand_dims", "relax.squeeze", "relax.flatten")
def reshape(call: Any, args: Sequence[Expr], e: Emitter) -> Expr:
    """A view in the shape Relax inferred."""
    return e.reshape(args[0], shape_of(call))


@lower("relax.broadcast_to")
def broadcast_to(call: Any, args: Sequence[Expr], e: Emitter) -> Expr:
    """Repeated along axes of one, or new leading axes."""
    return e.broadcast_to(args[0], shape_of(call))


@lower("relax.collapse_sum_to", "relax.collapse_sum_like")
def collapse_sum(call: Any, args: Sequence[Expr], e: Emitter) -> Expr:
    """The sum over what a broadcast repeated."""
    return e.sum_to(args[0], shape_of(call))


@lower("relax.permute_dims")
def permute_dims(call: Any, args: Sequence[Expr], e: Emitter) -> Expr:
    """All axes reversed when none are named."""
    rank = len(shape_of(args[0]))
    axes = plain(call.attrs.axes)
    axes = tuple(reversed(range(rank))) if axes is None else tuple(a % rank for a in axes)
    return e.permute(args[0], axes)


@lower("relax.concat")
def concat(call: Any, args: Sequence[Expr], e: Emitter) -> Expr:
    """A tuple of tensors along an axis."""
    axis = plain(call.attrs.axis) or 0
    return e.concat(args[0], axis % len(shape_of(call)))


@lower("relax.stack")
def stack(call: Any, args: Sequence[Expr], e: Emitter) -> Expr:
    """A concat of views with a new axis of one."""
    out = shape_of(call)
    axis = (plain(call.attrs.axis) or 0) % len(out)
    unit = [1 if i == axis else d for i, d in enumerate(out)]
    return e.concat([e.reshape(x, unit) for x in args[0]], axis)


@lower("relax.split")
def split(call: Any, args: Sequence[Expr], e: Emitter) -> tuple[Expr, ...]:
    """One slice for each part."""
    axis, parts, begin = int(call.attrs.axis) % len(shape_of(args[0])), [], 0
    for field in call.ty.fields:
        size = int(field.shape[axis])
        parts.append(e.narrow_axis(args[0], axis, begin, begin + size))
        begin += size
    return tuple(parts)


@lower("relax.strided_slice")
def strided_slice(call: Any, args: Sequence[Expr], e: Emitter) -> Expr:
    """Bounds clamped into the tensor, as Python's slices are."""
    x = args[0]
    shape = shape_of(x)
    axes, begins, ends = (plain(a) for a in call.args[1:4])
    steps = plain(call.args[4]) if len(call.args) > 4 else (1,) * len(axes)
    begin, end, strides = [0] * len(shape), list(shape), [1] * len(shape)
    for axis, b, stop, step in zip(axes, begins, ends, steps, strict=True):
        picked = range(*slice(b, stop, step).indices(shape[axis]))
        if step < 0:
            x = _flip(x, axis, e)
            begin[axis] = shape[axis] - 1 - picked.start
            end[axis] = begin[axis] + (len(picked) - 1) * -step + 1
        else:
            begin[axis], end[axis] = picked.start, max(picked.stop, picked.start)
        strides[axis] = abs(step)
    return e.slice(x, begin, end, strides)


@lower("relax.slice_scatter")
def slice_scatter(call: Any, args: Sequence[Expr], e: Emitter) -> Expr:
    """x with x[begin:end:step] replaced: the parts around it, and the new one between them."""
    x, part = args[:2]
    axis = int(call.attrs.axis) % len(shape_of(x))
    size = shape_of(x)[axis]
    picked = range(*slice(*(int(plain(a)) for a in call.args[2:5])).indices(size))
    if picked.step != 1:
        index = {p: i for i, p in enumerate(picked)}
        order = np.array([size + index[i] if i in index else i for i in range(size)], "int32")
        both, attrs = e.concat([x, part], axis), {"axis": axis, "mode": "fast"}
        return e.op("take", both, constant(order), shape=shape_of(x), dtype=dtype_of(x), **attrs)
    head = [e.narrow_axis(x, axis, 0, picked.start)] if picked.start > 0 else []
    tail = [e.narrow_axis(x, axis, picked.stop, size)] if picked.stop < size else []
    return e.concat([*head, part, *tail], axis)


@lower("relax.flip")
def flip(call: Any, args: Sequence[Expr], e: Emitter) -> Expr:
    """x in reverse along an axis: a lookup of constant indices."""
    return _flip(args[0], int(call.attrs.axis) % len(shape_of(args[0])), e)


def _flip(x: Expr, axis: int, e: Emitter) -> Expr:
    order = np.arange(shape_of(x)[axis], dtype="int32")[::-1].copy()
    attrs = {"axis": axis, "mode": "fast"}
    return e.op("take", x, constant(order), shape=shape_of(x), dtype=dtype_of(x), **attrs)


@lower("relax.tile")
def tile(call: Any, args: Sequence[Expr], e: Emitter) -> Expr:
    """The whole tensor repeated: a broadcast of views."""
    out, shape = shape_of(call), shape_of(args[0])
    shape = (1,) * (len(out) - len(shape)) + shape
    unit = [d for n in shape for d in (1, n)]
    wide = [d for n, total in zip(shape, out, strict=True) for d in (total // n, n)]
    return e.reshape(e.broadcast_to(e.reshape(args[0], unit), wide), out)


@lower("relax.repeat")
def repeat(call: Any, args: Sequence[Expr], e: Emitter) -> Expr:
    """Every element repeated along an axis."""
    axis, times = plain(call.attrs.axis), int(call.attrs.repeats)
    x = args[0] if axis is not None else e.reshape(args[0], [int(np.prod(shape_of(args[0])))])
    shape = list(shape_of(x))
    axis = (axis or 0) % len(shape)
    unit = [*shape[: axis + 1], 1, *shape[axis + 1 :]]
    wide = [*shape[: axis + 1], times, *shape[axis + 1 :]]
    return e.reshape(e.broadcast_to(e.reshape(x, unit), wide), shape_of(call))


@lower("relax.nn.pad")
def pad(call: Any, args: Sequence[Expr], e: Emitter) -> Expr:
    """Constant, reflected or repeated borders; circular ones are a concat of slices."""
    x, widths, mode = args[0], plain(call.attrs.pad_width), str(call.attrs.pad_mode)
    if mode == "circular":
        return _circular(x, widths, e)
    mode = {"replicate": "edge", "edge": "edge", "reflect": "reflect"}.get(mode, "constant")
    value = float(call.attrs.pad_value)
    attrs = {"pad_width": widths, "mode": mode, "value": value}
    return e.op("pad", x, shape=shape_of(call), dtype=dtype_of(x), **attrs)


def _circular(x: Expr, widths: Sequence[int], e: Emitter) -> Expr:
    for axis, (before, after) in enumerate(zip(widths[::2], widths[1::2], strict=True)):
        size = shape_of(x)[axis]
        head = [e.narrow_axis(x, axis, size - before, size)] if before else []
        tail = [e.narrow_axis(x, axis, 0, after)] if after else []
        x = e.concat([*head, x, *tail], axis)
    return x


@lower("relax.nn.pixel_shuffle")
def pixel_shuffle(call: Any, args: Sequence[Expr], e: Emitter) -> Expr:
    """[N, C*r*r, H, W] -> [N, C, H*r, W*r]: views around one permutation."""
    n, c, h, w = shape_of(args[0])
    r = int(call.attrs.upscale_factor)
    blocks = e.reshape(args[0], (n, c // (r * r), r, r, h, w))
    return e.reshape(e.permute(blocks, (0, 1, 4, 2, 5, 3)), shape_of(call))
