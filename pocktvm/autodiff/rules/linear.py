"""Gradients of products: each is a product again."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from pocktvm.autodiff.ops import Emitter, Expr, attrs_of, shape_of
from pocktvm.autodiff.rules.registry import gradient


@gradient("matmul")
def matmul_grad(call: Any, out: Expr, dout: Expr, e: Emitter) -> Sequence[Any]:
    """c = a b: da = dc bᵀ, db = aᵀ dc, with transposes as flags.

    A matrix b shared by a batch gets one product over all the batch's rows.
    """
    a, b = call.args
    attrs = attrs_of(call)
    ta, tb = attrs["transpose_a"], attrs["transpose_b"]

    def da() -> Expr:
        return e.matmul(b, dout, tb, True) if ta else e.matmul(dout, b, False, not tb)

    def db() -> Expr:
        left, grad = a, dout
        if len(shape_of(b)) < len(shape_of(a)):
            left, grad = _rows(a, ta, e), _rows(dout, False, e)
        flag = ta and left is a
        return e.matmul(grad, left, True, flag) if tb else e.matmul(left, grad, not flag, False)

    return [da, db]


def _rows(x: Expr, transposed: bool, e: Emitter) -> Expr:
    """A batch of matrices as one, rows under each other."""
    rank = len(shape_of(x))
    if transposed:
        x = e.permute(x, (*range(rank - 2), rank - 1, rank - 2))
    return e.reshape(x, (prod(shape_of(x)[:-1]), shape_of(x)[-1]))


@gradient("conv2d")
def conv2d_grad(call: Any, out: Expr, dout: Expr, e: Emitter) -> Sequence[Any]:
    """dx: conv2d_input_grad(dout, w); dw: conv2d_weight_grad(x, dout). Any stride, padding,
    dilation and number of groups."""
    x, w = call.args
    attrs = attrs_of(call)
    return [
        lambda: e.op("conv2d_input_grad", dout, w, shape=shape_of(x), **attrs),
        lambda: e.op("conv2d_weight_grad", x, dout, shape=shape_of(w), **attrs),
    ]


@gradient("conv2d_input_grad")
def conv2d_transpose_grad(call: Any, out: Expr, dout: Expr, e: Emitter) -> Sequence[Any]:
    """A transposed convolution's: dx = conv2d(dout, w); dw = conv2d_weight_grad(dout, x)."""
    x, w = call.args
    attrs = attrs_of(call)
    return [
        lambda: e.op("conv2d", dout, w, shape=shape_of(x), **attrs),
        lambda: e.op("conv2d_weight_grad", dout, x, shape=shape_of(w), **attrs),
    ]
