"""The exported program's operators, one by one, into Relax.

TVM's importer is taken where it is right. Converters here replace it where it is silently wrong
(`clamp_max` reads the wrong argument, a bool `cumsum` loses its dtype, ELU's gradient is NaN at
x > 88) or coarser than what the gradient rules and kernels want (attention, RMS norm, padding).
Every Relax variable is recorded with the torch layer it comes from, for messages.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
from torch import fx

from pocktvm.errors import PockError
from pocktvm.frontend.exported import constant, layer_of, operator_name
from pocktvm.tvm_api import relax, torch_importer

# exp(-1e30 - max) is exactly 0 like exp(-inf), and no kernel has to be careful with infinities.
MASKED = -1e30

Converter = Callable[[Any, fx.Node], Any]
CONVERTERS: dict[str, Converter] = {}


def converts(*names: str) -> Callable[[Converter], Converter]:
    """Register a converter for operators, by the names torch.export gives them."""

    def register(function: Converter) -> Converter:
        CONVERTERS.update(dict.fromkeys(names, function))
        return function

    return register


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """An operator's argument, given by position or by name."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def make_importer() -> Any:
    """TVM's importer with our converters; `.layers` maps Relax variables to torch layers."""

    class Importer(torch_importer()):  # type: ignore[misc]
        def create_convert_map(self) -> dict[str, Any]:
            self.layers: dict[str, str] = {}
            self._layer = ""
            table = super().create_convert_map()
            for name, function in CONVERTERS.items():
                table[name] = lambda node, function=function: function(self, node)
            return {name: self._guarded(function) for name, function in table.items()}

        def _guarded(self, function: Callable[[fx.Node], Any]) -> Callable[[fx.Node], Any]:
            def convert(node: fx.Node) -> Any:
                self._layer = layer_of(node)
                self._record_emits()
                try:
                    return function(node)
                except PockError:
                    raise
                except Exception as error:
                    raise PockError(
                        f"cannot import '{operator_name(node)}' (layer '{self._layer}'): "
                        f"{_first_line(error)}\n  Write the layer with other operators."
                    ) from error

            return convert

        def _record_emits(self) -> None:
            builder = self.block_builder
            if getattr(builder, "pock_recording", False):
                return
            emit = builder.emit

            def recording(expr: Any, name_hint: str = "") -> Any:
                var = emit(expr, name_hint)
                self.layers[var.name] = self._layer
                return var

            builder.emit = recording
            builder.pock_recording = True

    return Importer()


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1][:300] if lines else ''}"


def _shape(expr: Any) -> list[int]:
    return [int(d) for d in expr.ty.shape.values]


def _dtype(expr: Any) -> str:
    return str(expr.ty.dtype.dtype)


def _const(value: Any, dtype: str) -> Any:
    return relax.const(np.asarray(value, dtype), dtype)


@converts(constant.__name__)
def _constant(importer: Any, node: fx.Node) -> Any:
    array = node.args[0].value
    return relax.const(array, str(array.dtype))


# --- elementwise ---------------------------------------------------------------------------------


def _clip(importer: Any, x: Any, low: float | None, high: float | None) -> Any:
    if (low, high) == (0, 6):
        return importer.block_builder.emit(relax.op.nn.relu6(x))
    if (low, high) == (0, None):
        return importer.block_builder.emit(relax.op.nn.relu(x))
    floating = _dtype(x).startswith("float")
    info, number = (np.finfo("float32"), float) if floating else (np.iinfo(_dtype(x)), int)
    low = number(info.min if low is None else low)
    high = number(info.max if high is None else high)
    return importer.block_builder.emit(relax.op.clip(x, low, high))


@converts("hardtanh.default", "hardtanh_.default")
def _hardtanh(importer: Any, node: fx.Node) -> Any:
    low, high = argument(node, 1, "min_val", -1.0), argument(node, 2, "max_val", 1.0)
    return _clip(importer, importer.env[node.args[0]], low, high)


@converts("clamp.default", "clamp.Tensor")
def _clamp(importer: Any, node: fx.Node) -> Any:
    x, emit = importer.env[node.args[0]], importer.block_builder.emit
    low, high = argument(node, 1, "min"), argument(node, 2, "max")
    if isinstance(low, fx.Node):
        x, low = emit(relax.op.maximum(x, importer.env[low])), None
    if isinstance(high, fx.Node):
        x, high = emit(relax.op.minimum(x, importer.env[high])), None
    return x if low is high is None else _clip(importer, x, low, high)


@converts("clamp_min.default")
def _clamp_min(importer: Any, node: fx.Node) -> Any:
    return _clip(importer, importer.env[node.args[0]], argument(node, 1, "min"), None)


@converts("clamp_max.default")
def _clamp_max(importer: Any, node: fx.Node) -> Any:
    return _clip(importer, importer.env[node.args[0]], None, argument(node, 1, "max"))


@converts("elu.default", "elu_.default")
def _elu(importer: Any, node: fx.Node) -> Any:
    """where(x > 0, x, alpha * (exp(min(x, 0)) - 1)): no overflow in the branch not taken."""
    x, emit = importer.env[node.args[0]], importer.block_builder.emit
    dtype = _dtype(x)
    alpha = argument(node, 1, "alpha", 1.0)
    zero = _const(0, dtype)
    curve = emit(relax.op.exp(emit(relax.op.minimum(x, zero))))
    curve = emit(relax.op.subtract(curve, _const(1, dtype)))
    curve = emit(relax.op.multiply(curve, _const(alpha, dtype)))
    return emit(relax.op.where(emit(relax.op.greater(x, zero)), x, curve))


@converts("native_dropout.default")
def _native_dropout(importer: Any, node: fx.Node) -> Any:
    x = importer.env[node.args[0]]
    return (x, relax.op.ones_like(x))


@converts("cumsum.default")
def _cumsum(importer: Any, node: fx.Node) -> Any:
    x, emit = importer.env[node.args[0]], importer.block_builder.emit
    dtype = str(node.meta["val"].dtype).removeprefix("torch.")  # int64 for a bool, as torch has it
    if _dtype(x) != dtype:
        x = emit(relax.op.astype(x, dtype))
    return emit(relax.op.cumsum(x, argument(node, 1, "dim"), dtype))


# --- convolution and padding ---------------------------------------------------------------------


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
    pool = _two(node.args[1])
    pooled = importer.block_builder.emit(
        relax.op.nn.max_pool2d(
            importer.env[node.args[0]],
            pool,
            strides=_two(argument(node, 2, "stride") or pool),
            padding=_two(argument(node, 3, "padding", 0)),
            dilation=_two(argument(node, 4, "dilation", 1)),
            ceil_mode=bool(argument(node, 5, "ceil_mode", False)),
            layout="NCHW",
        )
    )
    return pooled if operator_name(node) == "max_pool2d.default" else (pooled, None)


def _two(value: Any) -> list[int]:
    values = [int(v) for v in value] if isinstance(value, list | tuple) else [int(value)]
    return values * 2 if len(values) == 1 else values


# --- norms and attention -------------------------------------------------------------------------


@converts("rms_norm.default")
def _rms_norm(importer: Any, node: fx.Node) -> Any:
    x = importer.env[node.args[0]]
    shape = [int(d) for d in node.args[1]]
    eps = argument(node, 3, "eps")
    eps = float(np.finfo("float32").eps) if eps is None else eps
    weight = argument(node, 2, "weight")
    gain = _const(np.ones(shape), _dtype(x)) if weight is None else importer.env[weight]
    axes = list(range(-len(shape), 0))
    return importer.block_builder.emit(relax.op.nn.rms_norm(x, gain, axes=axes, epsilon=eps))


@converts("scaled_dot_product_attention.default")
def _attention(importer: Any, node: fx.Node) -> Any:
    """softmax(q kᵀ·scale + mask) v, q (…, H, T, D), k (…, G, S, D), v (…, G, S, E) → (…, H, T, E).

    With grouped queries (G < H) the H/G queries of a group are stacked along T: keys and values
    are never repeated, and their gradients come out summed.
    """
    emit = importer.block_builder.emit
    query, key, value = (importer.env[a] for a in node.args[:3])
    q_shape, k_shape, v_shape = _shape(query), _shape(key), _shape(value)
    scale = argument(node, 6, "scale") or node.kwargs.get("scale") or q_shape[-1] ** -0.5
    scores_shape = [*q_shape[:-1], k_shape[-2]]
    grouped = len(q_shape) > 3 and q_shape[-3] != k_shape[-3]
    if grouped:
        rows = q_shape[-3] // k_shape[-3] * q_shape[-2]
        query = emit(relax.op.reshape(query, [*k_shape[:-2], rows, q_shape[-1]]))
    rank = len(q_shape)
    transposed = emit(relax.op.permute_dims(key, [*range(rank - 2), rank - 1, rank - 2]))
    scores = emit(relax.op.matmul(query, transposed))
    scores = emit(relax.op.multiply(scores, _const(scale, _dtype(query))))
    if grouped:
        scores = emit(relax.op.reshape(scores, scores_shape))
    for mask in _masks(importer, node, scores_shape, _dtype(query)):
        scores = emit(relax.op.add(scores, mask))
    weights = emit(relax.op.nn.softmax(scores, axis=-1))
    if grouped:
        weights = emit(relax.op.reshape(weights, [*k_shape[:-2], rows, k_shape[-2]]))
    out = emit(relax.op.matmul(weights, value))
    if grouped:
        out = emit(relax.op.reshape(out, [*q_shape[:-1], v_shape[-1]]))
    return out


def _masks(importer: Any, node: fx.Node, scores_shape: list[int], dtype: str) -> list[Any]:
    emit, masks = importer.block_builder.emit, []
    given = argument(node, 3, "attn_mask")
    if given is not None:
        mask = importer.env[given]
        if _dtype(mask) == "bool":
            mask = emit(relax.op.where(mask, _const(0, dtype), _const(MASKED, dtype)))
        masks.append(mask)
    if argument(node, 5, "is_causal", False):
        later = np.triu(np.ones(scores_shape[-2:], bool), 1)
        masks.append(relax.const(np.where(later, MASKED, 0).astype(dtype), dtype))
    return masks


# --- parts of tensors ----------------------------------------------------------------------------
# All of them become slices with plain bounds, so that slices can sink through rows (passes), and
# no tuple or index tensor is left to differentiate.


def _slice(importer: Any, x: Any, axis: int, begin: int, end: int, step: int = 1) -> Any:
    return importer.block_builder.emit(
        relax.op.strided_slice(x, axes=[axis], begin=[begin], end=[end], strides=[step])
    )


def _pieces(importer: Any, x: Any, axis: int, sizes: list[int]) -> list[Any]:
    bounds = np.cumsum([0, *sizes]).tolist()
    return [_slice(importer, x, axis, begin, end) for begin, end in pairwise(bounds)]


def _without(importer: Any, x: Any, axis: int) -> Any:
    shape = _shape(x)
    return importer.block_builder.emit(relax.op.reshape(x, shape[:axis] + shape[axis + 1 :]))


@converts("select.int")
def _select(importer: Any, node: fx.Node) -> Any:
    x, index = importer.env[node.args[0]], int(node.args[2])
    axis = int(node.args[1]) % len(_shape(x))
    index %= _shape(x)[axis]
    return _without(importer, _slice(importer, x, axis, index, index + 1), axis)


@converts("unbind.int")
def _unbind(importer: Any, node: fx.Node) -> Any:
    x = importer.env[node.args[0]]
    axis = int(argument(node, 1, "dim", 0)) % len(_shape(x))
    pieces = _pieces(importer, x, axis, [1] * _shape(x)[axis])
    return [_without(importer, piece, axis) for piece in pieces]


@converts("slice.Tensor")
def _slice_tensor(importer: Any, node: fx.Node) -> Any:
    x = importer.env[node.args[0]]
    axis = int(argument(node, 1, "dim", 0)) % len(_shape(x))
    size = _shape(x)[axis]
    bounds = slice(argument(node, 2, "start"), argument(node, 3, "end"), argument(node, 4, "step"))
    begin, end, step = bounds.indices(size)
    if (begin, end, step) == (0, size, 1):
        return x
    return _slice(importer, x, axis, begin, end, step)


@converts("split.Tensor", "split_with_sizes.default", "chunk.default")
def _split(importer: Any, node: fx.Node) -> Any:
    x = importer.env[node.args[0]]
    axis = int(argument(node, 2, "dim", 0)) % len(_shape(x))
    sizes = [int(part.shape[axis]) for part in node.meta["val"]]
    return _pieces(importer, x, axis, sizes)


@converts("stack.default")
def _stack(importer: Any, node: fx.Node) -> Any:
    emit, parts = importer.block_builder.emit, [importer.env[part] for part in node.args[0]]
    shape = _shape(parts[0])
    axis = int(argument(node, 1, "dim", 0)) % (len(shape) + 1)
    parts = [emit(relax.op.reshape(p, [*shape[:axis], 1, *shape[axis:]])) for p in parts]
    return emit(relax.op.concat(parts, axis))
