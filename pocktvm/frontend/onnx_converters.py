"""ONNX operators whose converters in TVM lose something the training needs.

TVM's own are kept for the rest. Here: `Clip` (TVM's is an opaque kernel without a gradient),
`Max`, `Min`, `Sum`, `Mean` (TVM stacks the operands), `Gather` (TVM adds wrap-around arithmetic to
ids), `Cast` (the same), `Resize`, `Pad`, pooling and convolution with automatic padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from typing import Any

import numpy as np

from pocktvm.frontend.converters.registry import const, dtype_of, shape_of
from pocktvm.registry import entry
from pocktvm.tvm_api import relax, tvm

UNBOUNDED = {"float32": (-3.4028235e38, 3.4028235e38), "int": (-(2**31), 2**31 - 1)}
RESIZE_MODES = {
    "align_corners": "align_corners", "half_pixel": "half_pixel",
    "pytorch_half_pixel": "half_pixel",
}  # fmt: skip


@dataclass(frozen=True)
class Site:
    """One node to convert: operator, Relax operands (None where absent), attributes, outputs."""

    builder: Any
    op: str
    inputs: Sequence[Any]
    attrs: dict[str, Any]
    outputs: int

    def emit(self, expr: Any) -> Any:
        """Bind an expression to a variable."""
        return self.builder.emit(expr)

    def operand(self, index: int) -> Any:
        """An operand, None where it is absent."""
        return self.inputs[index] if index < len(self.inputs) else None

    def setting(self, name: str, index: int, default: Any = None) -> Any:
        """An attribute of old opsets that newer ones read from a constant operand."""
        operand = self.operand(index)
        if operand is None:
            return self.attrs.get(name, default)
        if not is_const(operand):
            raise ValueError(f"'{name}' is computed at run time")
        return operand.value.numpy()


Converter = Callable[[Site], Any]
CONVERTERS: dict[str, Converter] = {}


def converts(*names: str) -> Callable[[Converter], Converter]:
    """Register a converter for operators, by their ONNX names."""
    return entry(CONVERTERS, *names)


def is_const(expr: Any) -> bool:
    """A value known at build time."""
    return isinstance(expr, tvm.ir.expr.GenericConst)


# Elementwise -----------------------------------------------------------------------------------


@converts("Clip")
def _clip(site: Site) -> Any:
    """Bounds that are parameters become maximum and minimum, which have gradients."""
    x = site.inputs[0]
    limits = UNBOUNDED["float32" if dtype_of(x) == "float32" else "int"]
    number = float if dtype_of(x) == "float32" else int
    bounds = [site.operand(1), site.operand(2)]
    if all(b is None or is_const(b) for b in bounds):
        low, high = (site.setting(n, i) for n, i in (("min", 1), ("max", 2)))
        low = number(limits[0] if low is None or np.isnan(low) else low)
        high = number(limits[1] if high is None or np.isnan(high) else high)
        return relax.op.clip(x, max(low, limits[0]), min(high, limits[1]))
    if bounds[0] is not None:
        x = site.emit(relax.op.maximum(x, bounds[0]))
    return x if bounds[1] is None else relax.op.minimum(x, bounds[1])


def _pairwise(function: Callable[[Any, Any], Any]) -> Converter:
    return lambda site: reduce(lambda a, b: site.emit(function(a, b)), site.inputs)


converts("Max")(_pairwise(relax.op.maximum))
converts("Min")(_pairwise(relax.op.minimum))
converts("Sum")(_pairwise(relax.op.add))


@converts("Mean")
def _mean(site: Site) -> Any:
    total = _pairwise(relax.op.add)(site)
    return relax.op.multiply(total, const(1 / len(site.inputs), dtype_of(total)))


@converts("Cast", "CastLike")
def _cast(site: Site) -> Any:
    if site.operand(1) is not None:
        return relax.op.astype(site.inputs[0], dtype_of(site.inputs[1]))
    from onnx.helper import tensor_dtype_to_np_dtype

    return relax.op.astype(site.inputs[0], str(tensor_dtype_to_np_dtype(site.attrs["to"])))


@converts("Identity", "Dropout")
def _identity(site: Site) -> Any:
    return site.inputs[0]


@converts("Softplus")
def _softplus(site: Site) -> Any:
    return relax.op.nn.softplus(site.inputs[0])


@converts("Gemm")
def _gemm(site: Site) -> Any:
    """alpha·A·B + beta·C, either matrix transposed."""
    a, b, c = site.inputs[0], site.inputs[1], site.operand(2)
    a, b = (
        site.emit(relax.op.permute_dims(m, [1, 0])) if site.attrs.get(flag) else m
        for m, flag in ((a, "transA"), (b, "transB"))
    )
    product = site.emit(relax.op.matmul(a, b))
    if (alpha := site.attrs.get("alpha", 1.0)) != 1.0:
        product = site.emit(relax.op.multiply(product, const(alpha, "float32")))
    if c is None:
        return product
    if (beta := site.attrs.get("beta", 1.0)) != 1.0:
        c = site.emit(relax.op.multiply(c, const(beta, "float32")))
    return relax.op.add(product, c)


# Norms -----------------------------------------------------------------------------------------


@converts("BatchNormalization")
def _batch_norm(site: Site) -> Any:
    """With the stored statistics, whatever `training_mode` says; only the first output is kept."""
    x, gain, shift, mean, var = site.inputs[:5]
    epsilon = site.attrs.get("epsilon", 1e-5)
    normed = relax.op.nn.batch_norm(
        x, gain, shift, mean, var, axis=1, epsilon=epsilon, training=False
    )
    return relax.TupleGetItem(site.emit(normed), 0)


@converts("LayerNormalization")
def _layer_norm(site: Site) -> Any:
    x, gain, shift = site.inputs[0], site.inputs[1], site.operand(2)
    rank = len(shape_of(x))
    axes = list(range(site.attrs.get("axis", -1) % rank, rank))
    sizes = [shape_of(x)[a] for a in axes]
    gain = site.emit(relax.op.broadcast_to(gain, sizes)) if shape_of(gain) != sizes else gain
    shift = const(np.zeros(sizes), "float32") if shift is None else shift
    epsilon = site.attrs.get("epsilon", 1e-5)
    return relax.op.nn.layer_norm(x, gain, shift, axes, epsilon)


# Convolution, pooling, resizing ----------------------------------------------------------------


def _windows(site: Site, kernel: Sequence[int]) -> dict[str, Any]:
    """strides, dilation and padding (all begins, then all ends) of a sliding window."""
    count = len(kernel)
    if count > 2:
        raise ValueError(f"{count} spatial dimensions; 1 and 2 are supported")
    strides = [int(s) for s in site.attrs.get("strides", [1] * count)]
    dilation = [int(d) for d in site.attrs.get("dilations", [1] * count)]
    pads = [int(p) for p in site.attrs.get("pads", [0] * (2 * count))]
    mode = site.attrs.get("auto_pad", b"NOTSET").decode()
    if mode.startswith("SAME"):
        totals = [
            max((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0)
            for n, s, d, k in zip(
                shape_of(site.inputs[0])[2:], strides, dilation, kernel, strict=True
            )
        ]
        less, more = [t // 2 for t in totals], [t - t // 2 for t in totals]
        pads = [*less, *more] if mode == "SAME_UPPER" else [*more, *less]
    return {"strides": strides, "padding": pads, "dilation": dilation}


@converts("Conv")
def _conv(site: Site) -> Any:
    x, weight, bias = site.inputs[0], site.inputs[1], site.operand(2)
    kernel = shape_of(weight)[2:]
    window, groups = _windows(site, kernel), site.attrs.get("group", 1)
    function = relax.op.nn.conv1d if len(kernel) == 1 else relax.op.nn.conv2d
    result = function(x, weight, groups=groups, **window)
    if bias is None:
        return result
    unit = site.emit(relax.op.reshape(bias, [1, -1, *[1] * len(kernel)]))
    return relax.op.add(site.emit(result), unit)


@converts("MaxPool", "AveragePool")
def _pool(site: Site) -> Any:
    """AveragePool alone has `count_include_pad`; the indices of MaxPool are not kept."""
    kernel = [int(k) for k in site.attrs["kernel_shape"]]
    ceil = bool(site.attrs.get("ceil_mode", 0))
    window = _windows(site, kernel)
    if site.op == "MaxPool":
        function = relax.op.nn.max_pool1d if len(kernel) == 1 else relax.op.nn.max_pool2d
    else:
        function = relax.op.nn.avg_pool1d if len(kernel) == 1 else relax.op.nn.avg_pool2d
        window["count_include_pad"] = bool(site.attrs.get("count_include_pad", 0))
    return function(site.inputs[0], kernel, ceil_mode=ceil, **window)


@converts("Pad")
def _pad(site: Site) -> Any:
    x, rank = site.inputs[0], len(shape_of(site.inputs[0]))
    pads = [int(p) for p in site.setting("pads", 1)]
    axes = [int(a) % rank for a in site.setting("axes", 3, range(rank))]
    if min(pads) < 0:
        raise ValueError("negative pads")
    widths = [0] * (2 * rank)
    for axis, before, after in zip(axes, pads, pads[len(axes) :], strict=False):
        widths[2 * axis : 2 * axis + 2] = before, after
    modes = {"wrap": "circular", "edge": "replicate"}
    mode = site.attrs.get("mode", b"constant").decode()
    value = float(np.ravel(site.setting("value", 2, 0.0))[0])
    return relax.op.nn.pad(x, widths, modes.get(mode, mode), value)


@converts("Resize")
def _resize(site: Site) -> Any:
    """Images up by nearest (floor, or whole factors) or bilinear."""
    x, attrs = site.inputs[0], site.attrs
    shape = shape_of(x)
    sizes, scales = site.setting("sizes", 3), site.setting("scales", 2)
    if sizes is None or len(sizes) == 0:
        sizes = [int(n * s) for n, s in zip(shape, scales, strict=True)]
    sizes = [int(s) for s in sizes]
    if len(shape) != 4 or sizes[:2] != shape[:2] or attrs.get("antialias"):
        raise ValueError(f"from {shape} to {sizes}: only the two axes of images are resized")
    mode = attrs.get("mode", b"nearest").decode()
    grid = attrs.get("coordinate_transformation_mode", b"half_pixel").decode()
    whole = all(out % n == 0 for n, out in zip(shape[2:], sizes[2:], strict=True))
    floor = attrs.get("nearest_mode", b"round_prefer_floor").decode() == "floor"
    if mode == "nearest" and ((grid == "asymmetric" and floor) or (grid == "half_pixel" and whole)):
        grid, method, rounding = "asymmetric", "nearest_neighbor", "floor"
    elif mode == "linear" and grid in RESIZE_MODES:
        grid, method, rounding = RESIZE_MODES[grid], "linear", ""
    else:
        raise ValueError(f"mode '{mode}' with the grid '{grid}'")
    return relax.op.image.resize2d(
        x, relax.ShapeExpr(sizes[2:]), layout="NCHW", method=method,
        coordinate_transformation_mode=grid, rounding_method=rounding,
    )  # fmt: skip


# Shapes ----------------------------------------------------------------------------------------


@converts("Reshape")
def _reshape(site: Site) -> Any:
    """0 keeps a size unless `allowzero`."""
    x, wanted = site.inputs[0], [int(d) for d in site.setting("shape", 1)]
    if not site.attrs.get("allowzero"):
        wanted = [shape_of(x)[i] if d == 0 else d for i, d in enumerate(wanted)]
    return relax.op.reshape(x, wanted)


@converts("Expand")
def _expand(site: Site) -> Any:
    wanted = np.broadcast_shapes(shape_of(site.inputs[0]), [int(d) for d in site.setting("", 1)])
    return relax.op.broadcast_to(site.inputs[0], list(wanted))


@converts("Gather")
def _gather(site: Site) -> Any:
    """One fixed index is a slice; ids that come at run time are not negative (their input says)."""
    x, ids = site.inputs[:2]
    shape = shape_of(x)
    axis = site.attrs.get("axis", 0) % len(shape)
    if not is_const(ids):
        return relax.op.take(x, ids, axis)
    fixed = ids.value.numpy() % shape[axis]
    if fixed.ndim:
        return relax.op.take(x, relax.const(fixed.astype("int64")), axis)
    return relax.op.reshape(
        _slice(site, x, axis, int(fixed), int(fixed) + 1), shape[:axis] + shape[axis + 1 :]
    )


def _slice(site: Site, x: Any, axis: int, begin: int, end: int) -> Any:
    return site.emit(relax.op.strided_slice(x, axes=[axis], begin=[begin], end=[end], strides=[1]))


@converts("Slice")
def _slices(site: Site) -> Any:
    x, rank = site.inputs[0], len(shape_of(site.inputs[0]))
    begins, ends = ([int(b) for b in site.setting(n, i)] for n, i in (("starts", 1), ("ends", 2)))
    axes = [int(a) % rank for a in site.setting("axes", 3, range(len(begins)))]
    steps = [int(s) for s in site.setting("steps", 4, [1] * len(begins))]
    return relax.op.strided_slice(x, axes=axes, begin=begins, end=ends, strides=steps)


@converts("Split")
def _split(site: Site) -> Any:
    """As slices, so that they can sink through rows and no tuple is left to differentiate."""
    x = site.inputs[0]
    shape = shape_of(x)
    axis = site.attrs.get("axis", 0) % len(shape)
    sizes = site.setting("split", 1)
    if sizes is None:
        part = -(-shape[axis] // site.outputs)
        sizes = [part] * (site.outputs - 1) + [shape[axis] - part * (site.outputs - 1)]
    bounds = np.cumsum([0, *sizes]).tolist()
    return tuple(_slice(site, x, axis, begin, end) for begin, end in pairwise(bounds))
