"""Products: matmul with transposes as flags, convolutions, all of them two-dimensional."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from pocktvm.autodiff.lowering.registry import lower
from pocktvm.autodiff.ops import Emitter, Expr, plain, shape_of
from pocktvm.errors import PockError


@lower("relax.matmul")
def matmul(call: Any, args: Sequence[Expr], e: Emitter) -> Expr:
    """numpy's matmul; see `product`."""
    return e.reshape(product(args[0], args[1], e), shape_of(call))


@lower("relax.outer")
def outer(call: Any, args: Sequence[Expr], e: Emitter) -> Expr:
    """A column times a row."""
    a, b = args
    return e.multiply(e.reshape(a, (shape_of(a)[0], 1)), e.reshape(b, (1, shape_of(b)[0])))


def product(a: Expr, b: Expr, e: Emitter) -> Expr:
    """a @ b, up to a reshape; permutations of the last two axes become flags.

    A matrix shared by a batch is multiplied once, the batch's rows laid under each other, so that
    its gradient is one product too and not a batch of products that are summed.
    """
    if len(shape_of(a)) == 1:
        a = e.reshape(a, (1, *shape_of(a)))
    if len(shape_of(b)) == 1:
        b = e.reshape(b, (*shape_of(b), 1))
    ranks = len(shape_of(a)), len(shape_of(b))
    if ranks[1] == 2 and ranks[0] > 2:
        lead, k = shape_of(a)[:-1], shape_of(a)[-1]
        y = product(e.reshape(a, (prod(lead), k)), b, e)
        return e.reshape(y, (*lead, shape_of(y)[-1]))
    (a, ta), (b, tb) = _untransposed(a, e), _untransposed(b, e)
    batch = np.broadcast_shapes(shape_of(a)[:-2], shape_of(b)[:-2])
    if ranks != (2, 2):
        a = e.broadcast_to(a, (*batch, *shape_of(a)[-2:]))
        b = e.broadcast_to(b, (*batch, *shape_of(b)[-2:]))
    return e.matmul(a, b, ta, tb)


def _untransposed(x: Expr, e: Emitter) -> tuple[Expr, bool]:
    """x without a permutation that swaps its last two axes, also through a view that merges
    leading axes, and whether there was one."""
    view = e.call_of(x, "reshape")
    inner = view.args[0] if view is not None else x
    call = e.call_of(inner, "permute_dims")
    if call is None or len(shape_of(inner)) < 2 or shape_of(x)[-2:] != shape_of(inner)[-2:]:
        return x, False
    axes = call.attrs["axes"]
    if axes[-1] > axes[-2]:
        return x, False
    swapped = e.permute(call.args[0], (*axes[:-2], axes[-1], axes[-2]))
    return e.reshape(swapped, (*shape_of(x)[:-2], shape_of(x)[-1], shape_of(x)[-2])), True


def sides(padding: Sequence[int]) -> tuple[int, ...]:
    """(top, left, bottom, right) from one, two or four numbers."""
    padding = tuple(padding)
    if len(padding) == 1:
        return padding * 4
    return padding * 2 if len(padding) == 2 else padding


def geometry(attrs: Any) -> dict[str, Any]:
    """Our attributes of a convolution from Relax's; a 1-D one gets a height of one."""
    strides, dilation = plain(attrs.strides), plain(attrs.dilation)
    padding = plain(attrs.padding)
    if str(attrs.data_layout) == "NCW":
        left, right = padding if len(padding) == 2 else padding * 2
        padding, strides, dilation = (0, left, 0, right), (1, *strides), (1, *dilation)
    if str(attrs.data_layout) not in ("NCW", "NCHW"):
        raise PockError(f"a convolution in layout {attrs.data_layout}; pocktvm reads NCHW.")
    return {
        "strides": tuple(strides) * (2 // len(strides)),
        "padding": sides(padding),
        "dilation": tuple(dilation) * (2 // len(dilation)),
        "groups": int(attrs.groups),
        "layout": "NCHW",
    }


def high(shape: Sequence[int]) -> tuple[int, ...]:
    """A 3-D shape with a height of one."""
    return (shape[0], shape[1], 1, shape[2]) if len(shape) == 3 else tuple(shape)


@lower("relax.nn.conv2d", "relax.nn.conv1d")
def conv(call: Any, args: Sequence[Expr], e: Emitter) -> Expr:
    """A convolution; conv1d is one of height 1."""
    x, w = (e.reshape(a, high(shape_of(a))) for a in args)
    y = e.op("conv2d", x, w, shape=high(shape_of(call)), **geometry(call.attrs))
    return e.reshape(y, shape_of(call))


@lower("relax.nn.conv2d_transpose", "relax.nn.conv1d_transpose")
def conv_transpose(call: Any, args: Sequence[Expr], e: Emitter) -> Expr:
    """The input gradient of the convolution whose weight, as O I H W, is this one's I O H W."""
    x, w = (e.reshape(a, high(shape_of(a))) for a in args)
    y = e.op("conv2d_input_grad", x, w, shape=high(shape_of(call)), **geometry(call.attrs))
    return e.reshape(y, shape_of(call))


@lower("relax.einsum")
def einsum(call: Any, args: Sequence[Expr], e: Emitter) -> Expr:
    """Pairwise from the left: each pair is one batched matmul."""
    spec = str(call.attrs.subscripts).replace(" ", "")
    left, _, out = spec.partition("->")
    labels, operands = left.split(","), list(args[0])
    if "." in spec or any(len(set(label)) != len(label) for label in labels):
        raise PockError(f"einsum '{spec}' repeats an index or has '...'; write it as matmuls.")
    out = out if "->" in spec else "".join(sorted(c for c in left if left.count(c) == 1))
    label, x = labels[0], operands[0]
    for i in range(1, len(operands)):
        later = out + "".join(labels[i + 1 :])
        label, x = _contract(label, x, labels[i], operands[i], later, e)
    label, x = _sum_out(label, x, out, e)
    return e.permute(x, [label.index(c) for c in out])


def _sum_out(label: str, x: Expr, kept: str, e: Emitter) -> tuple[str, Expr]:
    axes = [i for i, c in enumerate(label) if c not in kept]
    return "".join(c for c in label if c in kept), e.reduce("sum", x, axes)


def _contract(la: str, a: Expr, lb: str, b: Expr, later: str, e: Emitter) -> tuple[str, Expr]:
    la, a = _sum_out(la, a, lb + later, e)
    lb, b = _sum_out(lb, b, la + later, e)
    sizes = dict(zip(la + lb, shape_of(a) + shape_of(b), strict=True))
    batch = [c for c in la if c in lb and c in later]
    inner = [c for c in la if c in lb and c not in later]
    rows, columns = [c for c in la if c not in lb], [c for c in lb if c not in la]

    def total(names: Sequence[str]) -> int:
        return prod(sizes[c] for c in names)

    a = e.permute(a, [la.index(c) for c in batch + rows + inner])
    b = e.permute(b, [lb.index(c) for c in batch + columns + inner])
    lead = (total(batch),) if batch else ()
    a = e.reshape(a, (*lead, total(rows), total(inner)))
    b = e.reshape(b, (*lead, total(columns), total(inner)))
    label = "".join(batch + rows + columns)
    return label, e.reshape(e.matmul(a, b, tb=True), [sizes[c] for c in label])
