"""Convolution, padding, pooling, interpolation."""

from __future__ import annotations

from typing import Any

from torch import fx

from pocktvm.errors import PockError
from pocktvm.frontend.converters.registry import argument, converts, pair, shape_of
from pocktvm.frontend.exported import layer_of, operator_name
from pocktvm.tvm_api import relax


@converts("convolution.default")
def _convolution(importer: Any, node: fx.Node) -> Any:
    """A 2-D convolution takes the zero padding in front of it into its own (TensorFlow's SAME)."""
    x, weight, bias, strides, padding, dilation, transposed, _, groups = node.args
    if transposed or len(strides) != 2 or len(node.meta["val"].shape) != 4:
        return importer._convolution(node)
    top, left = padding
    bottom, right = padding
    before = _zero_padding(x)
    if before is not None:
        x = x.args[0]
        left, right, top, bottom = (
            left + before[0],
            right + before[1],
            top + before[2],
            (bottom + before[3]),
        )
    emit = importer.block_builder.emit
    result = emit(
        relax.op.nn.conv2d(
            importer.env[x],
            importer.env[weight],
            strides=list(strides),
            padding=[top, left, bottom, right],
            dilation=list(dilation),
            groups=groups,
            data_layout="NCHW",
            kernel_layout="OIHW",
        )
    )
    if bias is None:
        return result
    return emit(relax.op.add(result, emit(relax.op.reshape(importer.env[bias], [1, -1, 1, 1]))))


def _zero_padding(node: fx.Node) -> list[int] | None:
    """(left, right, top, bottom) when the node only pads the two image axes with zeros."""
    if operator_name(node) != "constant_pad_nd.default":
        return None
    pad = list(node.args[1])
    if argument(node, 2, "value", 0) or any(pad[4:]) or min(pad) < 0:
        return None
    return (pad + [0, 0, 0, 0])[:4]


@converts("max_pool2d_with_indices.default", "max_pool2d.default")
def _max_pool2d(importer: Any, node: fx.Node) -> Any:
    """The indices are not kept: whoever asks for them is refused."""
    pool = pair(node.args[1])
    pooled = importer.block_builder.emit(
        relax.op.nn.max_pool2d(
            importer.env[node.args[0]],
            pool,
            strides=pair(argument(node, 2, "stride") or pool),
            padding=pair(argument(node, 3, "padding", 0)),
            dilation=pair(argument(node, 4, "dilation", 1)),
            ceil_mode=bool(argument(node, 5, "ceil_mode", False)),
            layout="NCHW",
        )
    )
    return pooled if operator_name(node) == "max_pool2d.default" else (pooled, None)


@converts("adaptive_max_pool2d.default")
def _adaptive_max_pool2d(importer: Any, node: fx.Node) -> Any:
    """Windows of equal size, or a refusal."""
    x = importer.env[node.args[0]]
    sizes, wanted = shape_of(x)[-2:], pair(node.args[1])
    if any(size % out for size, out in zip(sizes, wanted, strict=True)):
        raise PockError(
            f"adaptive max pooling from {sizes} to {wanted} has windows of unequal size "
            f"(layer '{layer_of(node)}').\n  Choose an output size that divides the input's."
        )
    pool = [size // out for size, out in zip(sizes, wanted, strict=True)]
    pooled = relax.op.nn.max_pool2d(x, pool, strides=pool, layout="NCHW")
    return (importer.block_builder.emit(pooled), None)


@converts("upsample_nearest2d.vec")
def _upsample_nearest(importer: Any, node: fx.Node) -> Any:
    return _resize(importer, node, argument(node, 2, "scale_factors"), "nearest_neighbor")


@converts("upsample_bilinear2d.vec")
def _upsample_bilinear(importer: Any, node: fx.Node) -> Any:
    corners = bool(argument(node, 2, "align_corners", False))
    return _resize(importer, node, argument(node, 3, "scale_factors"), "linear", corners)


def _resize(importer: Any, node: fx.Node, factors: Any, method: str, corners: bool = False) -> Any:
    """torch samples nearest at floor(i · in/out), bilinear at pixel centres or at the corners."""
    x = importer.env[node.args[0]]
    before, after = shape_of(x)[-2:], [int(d) for d in node.meta["val"].shape[-2:]]
    if factors and any(b * f != a for b, f, a in zip(before, factors, after, strict=True)):
        raise PockError(
            f"interpolation from {before} by {list(factors)} does not end on whole pixels (layer "
            f"'{layer_of(node)}').\n  Give F.interpolate a size instead of a scale_factor."
        )
    mode = "align_corners" if corners else "half_pixel"
    return importer.block_builder.emit(
        relax.op.image.resize2d(
            x,
            relax.ShapeExpr(after),
            layout="NCHW",
            method=method,
            coordinate_transformation_mode="asymmetric" if "nearest" in method else mode,
            rounding_method="floor" if "nearest" in method else "",
        )
    )


@converts("avg_pool2d.default")
def _avg_pool2d(importer: Any, node: fx.Node) -> Any:
    """TVM's, which reads every argument but the divisor."""
    if argument(node, 6, "divisor_override") is not None:
        raise ValueError("divisor_override is not imported")
    return importer._avg_pool2d(node)
