"""Training steps as graphs, written by hand or drawn at random, for the tests of passes."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from graphs import Build
from hypothesis import strategies as st

from pocktvm.ir.graph import Graph

GRADIENT = {"role": "gradient"}
LOSS = {"axis": 1, "label_smoothing": 0.0, "ignore_index": -100}


def perceptron(depth: int = 5, rows: int = 128, width: int = 64) -> Graph:
    """Before any pass: a layer's input is kept for its weight, its sum for the activation."""
    b = Build()
    x, lr = b.input(rows, width), b.scalar("lr")
    kept, h = [], x
    weights = [b.param(width, width, name=f"w{i}") for i in range(depth)]
    for w in weights:
        z = b.op("matmul", h, w, shape=(rows, width), transpose_a=False, transpose_b=False)
        kept.append((h, z))
        h = b.op("gelu", z)
    loss = b.op("mean", h, shape=(), axes=(0, 1), keepdims=False)
    d = b.op("broadcast_to", b.const(np.float32(1 / (rows * width))), shape=(rows, width))
    updates = {}
    for w, (before, z) in reversed(list(zip(weights, kept, strict=True))):
        dz = b.op("gelu_grad", d, z, role="gradient")
        dw = b.op("matmul", before, dz, shape=(width, width), transpose_a=True, transpose_b=False)
        d = b.op("matmul", dz, w, shape=(rows, width), transpose_a=False, transpose_b=True)
        updates[w] = b.op("subtract", w, b.op("multiply", dw, lr))
    return b.graph(updates, loss=loss)


# --- an inverted residual block ---


def inverted_residual_step(
    batch: int = 2, channels: int = 8, size: int = 6, trained: bool = True,
    scale_trained: bool = False,
) -> Graph:  # fmt: skip
    """A pointwise + depthwise + pointwise block with batch norms and a skip, its loss and SGD step,
    as differentiation would write it."""
    b = Build()
    v = _block(b, batch, channels, size, trained)
    updates = _head_gradients(b, v, size)
    d1s = _block_gradients(b, v, updates)
    if trained:
        dw1 = b.conv(v.x0, d1s, op="conv2d_weight_grad", pad=0, shape=b.values[v.w1].shape)
        velocity = b.param(*b.values[v.w1].shape, name=f"momentum/{v.w1}", kind="optimizer")
        moved = b.op("add", b.op("multiply", velocity, b.const(np.float32(0.9))), dw1)
        updates |= {v.w1: _sgd(b, v, v.w1, moved), velocity: moved}
    if trained and scale_trained:
        dx0 = b.conv(d1s, v.w1, op="conv2d_input_grad", shape=b.values[v.x0].shape)
        product = b.op("multiply", dx0, v.x0, **GRADIENT)
        ds = b.op("sum", product, shape=(channels,), axes=(0, 2, 3))
        scale = b.param(channels, name="stem.scale")
        updates[scale] = _sgd(b, v, scale, ds)
    return b.graph(updates, loss=v.loss, output=v.logits)


def _block(b: Build, batch: int, channels: int, size: int, trained: bool) -> SimpleNamespace:
    """The forward pass; values by name."""
    v = SimpleNamespace(batch=batch, channels=channels, hidden=2 * channels)
    x = b.input(batch, channels, size, size)
    v.y, v.lr, hidden = b.input(batch, dtype="int32", name="y"), b.scalar("lr"), v.hidden
    v.w1 = b.param(hidden, channels, 1, 1, name="pw1.weight") if trained else None
    v.w1 = v.w1 or b.const(b.randn(hidden, channels, 1, 1), "pw1.weight")
    v.w2 = b.const(b.randn(hidden, 1, 3, 3), "dw.weight")
    v.w3 = b.const(b.randn(channels, hidden, 1, 1), "pw2.weight")
    v.wf = b.param(4, channels, name="fc.weight")
    v.beta = b.param(hidden, name="bn1.bias")
    stem = b.const(b.randn(channels, channels, 3, 3), "stem.weight")
    widths = (channels, hidden, hidden, channels)
    s0, v.s1, v.s2, v.s3 = (b.const(np.abs(b.randn(1, c, 1, 1)) + 0.5, "scale") for c in widths)

    def norm(value: str, count: int, scale: str, shift: str | None = None) -> str:
        value = b.op("multiply", value, scale)
        return b.op("add", value, shift or b.const(b.randn(1, count, 1, 1), "shift"))

    v.x0 = b.op("relu6", norm(b.conv(x, stem), channels, s0))
    c1 = b.conv(v.x0, v.w1)
    shift = b.op("reshape", v.beta, shape=(1, hidden, 1, 1))
    v.r1 = b.op("relu6", norm(c1, hidden, v.s1, shift))
    v.r2 = b.op("relu6", norm(b.conv(v.r1, v.w2, groups=hidden), hidden, v.s2))
    v.z = b.op("add", norm(b.conv(v.r2, v.w3), channels, v.s3), v.x0)
    m = b.op("mean", v.z, shape=(batch, channels, 1, 1), axes=(2, 3), keepdims=True)
    v.f = b.op("reshape", m, shape=(batch, channels))
    wt = b.op("permute_dims", v.wf, shape=(channels, 4), axes=(1, 0))
    v.logits = b.op("matmul", v.f, wt, shape=(batch, 4))
    v.loss = b.op("cross_entropy", v.logits, v.y, shape=(), **LOSS)
    return v


def _head_gradients(b: Build, v: SimpleNamespace, size: int) -> dict[str, str]:
    """The classifier's update; `v.dz` becomes the gradient of the block's result."""
    one, g = b.const(np.float32(1), "one"), GRADIENT
    dl = b.op("cross_entropy_grad", v.logits, v.y, one, shape=(v.batch, 4), **LOSS, **g)
    df = b.op("matmul", dl, v.wf, shape=(v.batch, v.channels), **g)
    ft = b.op("permute_dims", v.f, shape=(v.channels, v.batch), axes=(1, 0), **g)
    dwt = b.op("matmul", ft, dl, shape=(v.channels, 4), **g)
    dwf = b.op("permute_dims", dwt, shape=(4, v.channels), axes=(1, 0), **g)
    dm = b.op("reshape", df, shape=(v.batch, v.channels, 1, 1), **g)
    dm = b.op("divide", dm, b.const(np.float32(size * size), "pixels"), **g)
    v.dz = b.op("broadcast_to", dm, shape=b.values[v.z].shape, **g)
    return {v.wf: _sgd(b, v, v.wf, dwf)}


def _block_gradients(b: Build, v: SimpleNamespace, updates: dict[str, str]) -> str:
    """Back to the first convolution's result; the shift's update is added."""
    g = GRADIENT
    d3 = b.op("multiply", v.dz, v.s3, **g)
    dr2 = b.conv(d3, v.w3, op="conv2d_input_grad", shape=b.values[v.r2].shape)
    d2 = b.op("multiply", b.op("relu6_grad", dr2, v.r2, **g), v.s2, **g)
    dr1 = b.conv(d2, v.w2, groups=v.hidden, op="conv2d_input_grad", shape=b.values[v.r1].shape)
    d1 = b.op("relu6_grad", dr1, v.r1, **g)
    db = b.op("sum", d1, shape=(1, v.hidden, 1, 1), axes=(0, 2, 3), keepdims=True, **g)
    db = b.op("reshape", db, shape=(v.hidden,), **g)
    updates[v.beta] = _sgd(b, v, v.beta, db)
    return b.op("multiply", d1, v.s1, **g)


def _sgd(b: Build, v: SimpleNamespace, parameter: str, gradient: str) -> str:
    return b.op("subtract", parameter, b.op("multiply", gradient, v.lr, **GRADIENT))


# --- at random ---

UNARY = ("relu", "sigmoid", "negative", "square", "copy", "relu6")


def _convolution(draw, b, v, pool):
    c = b.values[v].shape[1]
    frozen = draw(st.booleans())
    return b.conv(v, b.const(b.randn(c, c, 3, 3), "w") if frozen else b.param(c, c, 3, 3))


def _pair(draw, b, v, pool):
    op = draw(st.sampled_from(["add", "multiply", "subtract"]))
    return b.op(op, v, draw(st.sampled_from(pool)))


def _channels(draw, b, v, pool):
    op = draw(st.sampled_from(["add", "multiply"]))
    return b.op(op, v, b.const(b.randn(1, b.values[v].shape[1], 1, 1)))


def _mean(draw, b, v, pool):
    shape = b.values[v].shape
    m = b.op("mean", v, shape=(*shape[:2], 1, 1), axes=(2, 3), keepdims=True)
    return b.op("broadcast_to", m, shape=shape)


def _turned(draw, b, v, pool):
    (n, c, *_), shape = b.values[v].shape, b.values[v].shape
    flat = b.op("reshape", v, shape=(n, c, 16))
    turned = b.op("permute_dims", flat, shape=(n, 16, c), axes=(0, 2, 1))
    back = b.op("permute_dims", b.op("relu", turned), shape=(n, c, 16), axes=(0, 2, 1))
    return b.op("reshape", back, shape=shape)


def _cut(draw, b, v, pool):
    n, c = b.values[v].shape[:2]
    cut = dict(begin=(0, 1, 0, 0), end=(n, c, 4, 4), strides=(1, 1, 1, 1))
    part = b.op("strided_slice", v, shape=(n, c - 1, 4, 4), **cut)
    first = dict(begin=(0, 0, 0, 0), end=(n, 1, 4, 4), strides=(1, 1, 1, 1))
    other = b.op("strided_slice", v, shape=(n, 1, 4, 4), **first)
    return b.op("concat", part, other, shape=(n, c, 4, 4), axis=1)


KINDS = (
    _convolution,
    lambda draw, b, v, pool: b.op(draw(st.sampled_from(UNARY)), v),
    _pair,
    _channels,
    _mean,
    _turned,
    _cut,
    lambda draw, b, v, pool: b.op("add", v, b.const(np.float32(draw(st.sampled_from([0.0, 0.5]))))),
    lambda draw, b, v, pool: b.op("softmax", v, axis=draw(st.sampled_from([1, 3]))),
)


@st.composite
def random_graph(draw):
    """A DAG over 4-D values mixing spatial, elementwise, view and reduction operators."""
    b = Build(draw(st.integers(0, 99)))
    n, c = draw(st.sampled_from([(1, 4), (2, 3)]))
    x = b.input(n, c, 4, 4)
    pool = [x]
    for _ in range(draw(st.integers(3, 12))):
        v = draw(st.sampled_from(pool))
        pool.append(KINDS[draw(st.integers(0, len(KINDS) - 1))](draw, b, v, pool))
    last = pool[-1]
    total = b.op("sum", last, shape=(), axes=(0, 1, 2, 3))
    w = next(iter(b.params), None)
    return b.graph({} if w is None else _updates(draw, b, x, last, w), loss=total, output=last)


def _updates(draw, b, x, last, w):
    """Of a weight with momentum and of a bias, which depends on the weight's old value."""
    dw = b.conv(x, last, op="conv2d_weight_grad", shape=b.values[w].shape, pad=1)
    lr = b.scalar("lr")
    state = b.param(*b.values[w].shape, name=f"momentum/{w}", kind="optimizer")
    moved = b.op("add", b.op("multiply", state, b.const(np.float32(0.9))), dw)
    step = b.op("multiply", moved, lr)
    updates = {state: moved, w: b.op("subtract", w, step)}
    # a reader of the old weight behind the update, and an update that depends on it
    shape = b.values[last].shape
    dx = b.conv(last, w, op="conv2d_input_grad", shape=shape, pad=1)
    if draw(st.booleans()):
        dx = b.op("multiply", dx, b.op("sum", step, shape=(), axes=(0, 1, 2, 3)))
    bias = b.param(shape[1], name="bias")
    db = b.op("sum", dx, shape=(shape[1],), axes=(0, 2, 3))
    return updates | {bias: b.op("subtract", bias, b.op("multiply", db, lr))}
