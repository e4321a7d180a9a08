"""Gradients of operators that move elements: the same elements moved back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pocktvm.autodiff.ops import Emitter, Expr, attrs_of, shape_of
from pocktvm.autodiff.rules.registry import gradient
from pocktvm.errors import PockError


@gradient("reshape")
def reshape_grad(call: Any, out: Expr, dout: Expr, e: Emitter) -> Sequence[Any]:
    """dout in x's shape."""
    return [e.reshape(dout, shape_of(call.args[0]))]


@gradient("permute_dims")
def permute_dims_grad(call: Any, out: Expr, dout: Expr, e: Emitter) -> Sequence[Any]:
    """dout with its axes put back: the inverse permutation."""
    axes = attrs_of(call)["axes"]
    inverse = sorted(range(len(axes)), key=axes.__getitem__)
    return [e.permute(dout, inverse)]


@gradient("broadcast_to")
def broadcast_to_grad(call: Any, out: Expr, dout: Expr, e: Emitter) -> Sequence[Any]:
    """The sum over what was repeated."""
    return [e.sum_to(dout, shape_of(call.args[0]))]


@gradient("concat")
def concat_grad(call: Any, out: Expr, dout: Expr, e: Emitter) -> Sequence[Any]:
    """Each operand's slice of dout."""
    axis, begin, partials = attrs_of(call)["axis"], 0, []
    for x in call.args:
        end = begin + shape_of(x)[axis]
        partials.append(lambda begin=begin, end=end: e.narrow_axis(dout, axis, begin, end))
        begin = end
    return partials


@gradient("strided_slice")
def strided_slice_grad(call: Any, out: Expr, dout: Expr, e: Emitter) -> Sequence[Any]:
    """dout placed into zeros of x's shape."""
    x = call.args[0]
    return [e.op("strided_slice_grad", dout, shape=shape_of(x), **attrs_of(call))]


@gradient("strided_slice_grad")
def strided_slice_grad_grad(call: Any, out: Expr, dout: Expr, e: Emitter) -> Sequence[Any]:
    """The gradient of a slice's gradient: the same slice of dout."""
    attrs = attrs_of(call)
    return [e.slice(dout, attrs["begin"], attrs["end"], attrs["strides"])]


@gradient("pad")
def pad_grad(call: Any, out: Expr, dout: Expr, e: Emitter) -> Sequence[Any]:
    """A constant border: the inside of dout. A reflected or repeated one: the border's elements
    folded back onto the elements they are copies of, axis by axis."""
    attrs, x = attrs_of(call), call.args[0]
    widths = list(zip(attrs["pad_width"][::2], attrs["pad_width"][1::2], strict=True))
    if attrs["mode"] == "constant":
        back = tuple(-w for w in attrs["pad_width"])
        return [e.op("pad", dout, shape=shape_of(x), pad_width=back, mode="constant", value=0.0)]
    if any(w < 0 for w in attrs["pad_width"]):
        raise PockError(f"layer '{e.layer}': a {attrs['mode']} pad that also crops has no gradient")
    dx = dout
    for axis, (before, after) in enumerate(widths):
        if before or after:
            dx = _fold(dx, axis, before, after, attrs["mode"], e)
    return [dx]


def _fold(dx: Expr, axis: int, before: int, after: int, mode: str, e: Emitter) -> Expr:
    """Adds the border of one axis to its sources: a product with a 0/1 matrix [padded, inner]."""
    import numpy as np

    from pocktvm.autodiff.ops import constant

    inner = shape_of(dx)[axis] - before - after
    source = np.pad(np.arange(inner), (before, after), mode=mode)  # type: ignore[call-overload]
    matrix = (source[:, None] == np.arange(inner)[None, :]).astype("float32")
    rank = len(shape_of(dx))
    order = [*(i for i in range(rank) if i != axis), axis]
    last = e.permute(dx, order)
    *lead, _ = shape_of(last)
    flat = e.matmul(e.reshape(last, (int(np.prod(lead)), matrix.shape[0])), constant(matrix))
    folded = e.reshape(flat, (*lead, inner))
    return e.permute(folded, sorted(range(rank), key=order.__getitem__))
