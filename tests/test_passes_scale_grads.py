"""Scale gradients from weight gradients, and losses along the axis the classes lie on."""

import numpy as np
import pytest
from graphs import Build, ops, same_numbers

from pocktvm.passes import run_passes
from pocktvm.passes.scale_grads import scale_grads
from pocktvm.passes.simplify import simplify


def scaled_conv(groups=1, keepdims=False, size=8, channels=4, other_dy=False):
    """y = conv(x, w) * s, a squared loss, SGD on w and s; the weight gradient comes last."""
    b = Build()
    x, lr = b.input(2, channels, size, size), b.scalar()
    w = b.param(channels, channels // groups, 3, 3, name="w")
    s = b.param(channels, name="s")
    c = b.conv(x, w, groups=groups)
    sv = b.op("reshape", s, shape=(1, channels, 1, 1))
    y = b.op("multiply", c, sv)
    loss = b.op("mean", b.op("square", y), shape=(), axes=(0, 1, 2, 3))
    dy = b.op("multiply", y, b.const(np.float32(0.01)))
    shape = (1, channels, 1, 1) if keepdims else (channels,)
    product = b.op("multiply", dy, c)
    ds = b.op("sum", product, shape=shape, axes=(0, 2, 3), keepdims=keepdims)
    ds = b.op("reshape", ds, shape=(channels,)) if keepdims else ds
    new_s = b.op("subtract", s, b.op("multiply", ds, lr))
    dyw = b.op("relu", dy) if other_dy else dy
    dw = b.conv(x, dyw, groups=groups, op="conv2d_weight_grad", shape=b.values[w].shape)
    dw = b.op("multiply", dw, b.op("reshape", s, shape=(channels, 1, 1, 1)))
    new_w = b.op("subtract", w, b.op("multiply", dw, lr))
    return b.graph({s: new_s, w: new_w}, loss=loss), c


def readers(graph, name):
    return [n.op for n in graph.nodes if name in n.inputs]


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("keepdims", [False, True])
def test_the_image_is_not_read_again(groups, keepdims):
    graph, conv = scaled_conv(groups, keepdims)
    after = scale_grads(graph)
    assert readers(graph, conv) == ["multiply", "multiply"]
    assert readers(after, conv) == ["multiply"]
    assert ops(after).count("conv2d_weight_grad") == 1
    same_numbers(graph, after, 1e-4)
    same_numbers(graph, run_passes(graph), 1e-4)


def test_declines_for_another_gradient_or_a_large_weight():
    for graph, _ in (scaled_conv(other_dy=True), scaled_conv(size=2, channels=8)):
        assert ops(scale_grads(graph)) == ops(graph)


def loss_graph(axes, labels, shape=(2, 5, 3)):
    """Logits [2, 5, 3] permuted before a cross-entropy over axis 1, its gradient permuted back."""
    b = Build()
    x, y = b.input(*shape), b.input(*labels, dtype="int32", name="y")
    z = b.op("tanh", x)
    moved = tuple(shape[a] for a in axes)
    p = b.op("permute_dims", z, shape=moved, axes=axes)
    attrs = dict(axis=1, label_smoothing=0.1, ignore_index=-100)
    loss = b.op("cross_entropy", p, y, shape=(), **attrs)
    one = b.const(np.float32(1))
    d = b.op("cross_entropy_grad", p, y, one, shape=moved, **attrs)
    back = b.op("permute_dims", d, shape=shape, axes=tuple(np.argsort(axes)))
    return b.graph(loss=loss, output=b.op("multiply", back, z))


def test_classes_are_read_where_they_lie():
    graph = loss_graph((0, 2, 1), (2, 5))
    after = simplify(graph)
    assert ops(after) == ["tanh", "cross_entropy", "cross_entropy_grad", "multiply"]
    assert after.nodes[1].attrs["axis"] == 2
    same_numbers(graph, after, 1e-5)


def test_a_permutation_of_the_samples_stays():
    for axes, labels in (((1, 2, 0), (5, 2)), ((2, 1, 0), (3, 2))):
        graph = loss_graph(axes, labels)
        after = simplify(graph)
        assert "permute_dims" in ops(after)
        same_numbers(graph, after, 1e-5)
