"""fold_scales and assign_layout: before, after, and where they decline."""

import numpy as np
import pytest
from graphs import Build, ops, same_numbers

from pocktvm.passes.assign_layout import WEIGHT, assign_layout
from pocktvm.passes.fold_scales import fold_scales
from pocktvm.passes.simplify import simplify


def folded(b, expected, updates=None, **outputs):
    graph = b.graph(updates, **outputs)
    after = fold_scales(graph)
    assert ops(after) == expected
    same_numbers(graph, after, 1e-4)
    return after


def scale(b, c, rank=4):
    return b.const(np.abs(b.randn(*(1, c, 1, 1)[:rank])) + 0.5, "s")


@pytest.mark.parametrize("groups", [1, 4])
def test_forward_scale_goes_into_a_frozen_weight(groups):
    b = Build()
    x, w = b.input(2, 4, 5, 5), b.const(b.randn(4, 4 // groups, 3, 3), "w")
    c = b.op("add", b.conv(x, w, groups=groups), b.const(b.randn(1, 4, 1, 1)))
    y = b.op("add", b.op("multiply", c, scale(b, 4)), b.const(b.randn(1, 4, 1, 1)))
    folded(b, ["conv2d", "add", "add"], y=y)


def test_forward_scale_stays_behind_a_trained_weight():
    b = Build()
    y = b.op("multiply", b.conv(b.input(2, 4, 5, 5), b.param(4, 4, 3, 3)), scale(b, 4))
    folded(b, ["conv2d", "multiply"], y=y)


def test_forward_scale_stays_when_the_raw_result_is_read():
    b = Build()
    c = b.conv(b.input(2, 4, 5, 5), b.const(b.randn(4, 4, 3, 3)))
    folded(b, ["conv2d", "multiply"], y=b.op("multiply", c, scale(b, 4)), raw=c)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("groups", [1, 4])
def test_backward_scale_moves_to_the_weights(trained, groups):
    b = Build()
    x, dy = b.input(2, 4, 5, 5), b.input(2, 4, 5, 5, name="dy")
    shape = (4, 4 // groups, 3, 3)
    w = b.param(*shape) if trained else b.const(b.randn(*shape))
    d = b.op("multiply", dy, scale(b, 4))
    dx = b.conv(d, w, groups=groups, op="conv2d_input_grad", shape=(2, 4, 5, 5))
    dw = b.conv(x, d, groups=groups, op="conv2d_weight_grad", shape=shape, pad=1)
    db = b.op("sum", d, shape=(4,), axes=(0, 2, 3))
    weight = ["multiply"] if trained else []
    tail = ["conv2d_weight_grad", "multiply", "reshape", "sum"]
    after = fold_scales(graph := b.graph(dx=dx, dw=dw, db=db))
    found = [o for o in ops(after) if o != "reshape"]
    assert found == [*weight, "conv2d_input_grad", *[t for t in tail if t != "reshape"], "multiply"]
    same_numbers(graph, after, 1e-4)


def test_backward_scale_stays_when_someone_reads_it():
    b = Build()
    d = b.op("multiply", b.input(2, 4, 5, 5), scale(b, 4))
    dx = b.conv(d, b.const(b.randn(4, 4, 3, 3)), op="conv2d_input_grad", shape=(2, 4, 5, 5))
    folded(b, ["multiply", "conv2d_input_grad"], dx=dx, d=d)


def test_matmul_scales():
    b = Build()
    x, w = b.input(5, 4), b.const(b.randn(3, 4))
    into = b.op("multiply", x, b.const(b.randn(4)))
    y = b.op("matmul", into, w, shape=(5, 3), transpose_b=True)
    folded(b, ["matmul"], y=b.op("multiply", y, b.const(b.randn(3))))


def laid_out(graph):
    after = simplify(assign_layout(graph))
    same_numbers(graph, after, 1e-4)
    return after


@pytest.mark.parametrize("batch", [1, 2])
def test_channels_last_between_border_permutes(batch):
    b = Build()
    x = b.input(batch, 3, 6, 6)
    c = b.op("relu", b.conv(x, b.const(b.randn(4, 3, 3, 3))))
    c = b.op("add", b.conv(c, b.param(4, 1, 3, 3), groups=4), b.const(b.randn(4, 1, 1)))
    m = b.op("mean", c, shape=(batch, 4, 1, 1), axes=(2, 3), keepdims=True)
    gate = b.op("sigmoid", b.conv(m, b.const(b.randn(4, 4, 1, 1))))
    y = b.op("multiply", c, gate)
    pooled = b.op("mean", y, shape=(batch, 4), axes=(2, 3))
    after = laid_out(b.graph(y=y, pooled=pooled))
    assert ops(after).count("permute_dims") == 2  # the image, and the 4-D result
    assert {n.attrs["layout"] for n in after.nodes if n.op == "conv2d"} == {"NHWC"}
    assert after.params["w"].value.shape == (3, 3, 1, 4) and after.params["w"].perm == WEIGHT


def test_axes_follow():
    b = Build()
    x = b.input(2, 4, 6, 6)
    c = b.conv(x, b.const(b.randn(4, 4, 3, 3)))
    cut = dict(begin=(0, 1, 0, 2), end=(2, 3, 6, 6), strides=(1, 1, 2, 1))
    s = b.op("strided_slice", c, shape=(2, 2, 3, 4), **cut)
    p = b.op("pad", s, shape=(2, 4, 4, 4), pad_width=(0, 0, 1, 1, 0, 1, 0, 0), mode="constant")
    k = b.op("concat", p, p, shape=(2, 8, 4, 4), axis=1)
    y = b.conv(b.op("softmax", k, axis=1), b.const(b.randn(2, 8, 1, 1)))
    total = b.op("sum", y, shape=(2, 2), axes=(2, 3))
    after = laid_out(b.graph(total=total))
    assert ops(after).count("permute_dims") == 1


def test_updates_and_states_are_stored_like_their_weight():
    b = Build()
    x, dy = b.input(2, 4, 6, 6), b.input(2, 8, 6, 6, name="dy")
    w = b.param(8, 4, 3, 3)
    m = b.param(8, 4, 3, 3, name="exp_avg/w", kind="optimizer")
    y = b.conv(x, w)
    dw = b.conv(x, dy, op="conv2d_weight_grad", shape=(8, 4, 3, 3), pad=1)
    new_m = b.op("add", m, dw)
    new_w = b.op("subtract", w, b.op("multiply", new_m, b.scalar("lr")))
    graph = b.graph({w: new_w, m: new_m}, y=b.op("sum", y, shape=(), axes=(0, 1, 2, 3)))
    after = laid_out(graph)
    assert ops(after).count("permute_dims") == 2  # x and dy
    assert after.params[m].perm == after.params[w].perm == WEIGHT


def test_a_flattened_image_is_permuted_back():
    b = Build()
    c = b.conv(b.input(2, 3, 4, 4), b.const(b.randn(4, 3, 3, 3)))
    after = laid_out(b.graph(y=b.op("reshape", c, shape=(2, 64))))
    assert ops(after) == ["permute_dims", "conv2d", "permute_dims", "reshape"]


def test_a_sum_that_keeps_axes_of_length_one():
    b = Build()
    c = b.conv(b.input(2, 3, 1, 1), b.const(b.randn(4, 3, 1, 1)))
    after = laid_out(b.graph(y=b.op("sum", c, shape=(4, 1, 1), axes=(0,))))
    assert ops(after) == ["reshape", "conv2d", "sum", "reshape"]


def test_attention_shapes_stay():
    b = Build()
    q = b.input(2, 3, 5, 4)
    s = b.op("softmax", b.op("add", q, b.const(b.randn(1, 1, 5, 4))), axis=3)
    graph = b.graph(y=s)
    assert ops(assign_layout(graph)) == ops(graph)


def test_segmentation_loss_moves_its_class_axis():
    b = Build()
    x, y = b.input(2, 3, 4, 4), b.input(2, 4, 4, dtype="int32", name="y")
    c = b.conv(x, b.const(b.randn(5, 3, 1, 1)))
    attrs = dict(axis=1, label_smoothing=0.0, ignore_index=-100)
    loss = b.op("cross_entropy", c, y, shape=(), **attrs)
    d = b.op("cross_entropy_grad", c, y, b.const(np.float32(1)), shape=(2, 5, 4, 4), **attrs)
    dw = b.conv(x, d, op="conv2d_weight_grad", shape=(5, 3, 1, 1), pad=0)
    total = b.op("sum", b.op("square", dw), shape=(), axes=(0, 1, 2, 3))
    after = laid_out(b.graph(loss=loss, total=total))
    assert ops(after).count("permute_dims") == 1
