"""The whole pipeline: a small MobileNet block's training step, and random graphs."""

import numpy as np
import pytest
from graphs import Build, inverted_residual_step, ops, same_numbers
from hypothesis import given, settings
from hypothesis import strategies as st

from pocktvm.passes import PIPELINE, run_passes
from pocktvm.passes.order import Dag, peak_bytes


@pytest.mark.parametrize("trained, scale_trained", [(False, False), (True, False), (True, True)])
def test_every_pass_keeps_the_numbers(trained, scale_trained):
    graph = inverted_residual_step(trained=trained, scale_trained=scale_trained)
    for function in PIPELINE:
        after = function(graph).check()
        same_numbers(graph, after, 2e-4)
        graph = after


def test_the_block_becomes_few_kernels():
    graph = run_passes(inverted_residual_step(scale_trained=True))
    assert ops(graph).count("permute_dims") == 1  # the image
    groups = [[n.op for n in node.body] for node in graph.nodes if node.body]
    assert ["conv2d", "add", "relu6"] in groups  # frozen: the scale is in the weight
    assert ["conv2d", "multiply", "add", "relu6"] in groups  # trained: the scale stays
    assert ["conv2d_input_grad", "relu6_grad"] in groups
    weight = next(g for g in groups if "conv2d_weight_grad" in g)
    assert weight.count("subtract") == 1 and "add" in weight  # momentum and update
    assert any(g[0] == "sum" and g[-1] == "subtract" for g in groups)
    assert graph.params["pw1.weight"].perm == (2, 3, 1, 0)
    assert graph.params["momentum/pw1.weight"].perm == (2, 3, 1, 0)
    assert graph.params["pw1.weight"].torch_shape == (16, 8, 1, 1)
    unfused = [n.op for n in graph.nodes if not n.body and n.op not in ("reshape",)]
    assert len(unfused) <= 10


def test_observe_sees_every_pass():
    seen = []
    run_passes(inverted_residual_step(), observe=lambda i, name, g: seen.append((i, name)))
    assert [i for i, _ in seen] == list(range(len(PIPELINE)))
    assert seen[-1][1] == PIPELINE[-1].__name__


def test_updates_run_after_every_reader():
    graph = run_passes(inverted_residual_step(scale_trained=True))
    for param, value in graph.updates.items():
        writer = next(i for i, n in enumerate(graph.nodes) if value in n.outputs)
        assert all(i <= writer for i, n in enumerate(graph.nodes) if param in n.inputs)


def test_order_never_raises_the_peak():
    graph = inverted_residual_step(scale_trained=True)
    for function in PIPELINE[:-1]:
        graph = function(graph)
    legal = Dag(graph).stable(lambda i: i)
    assert peak_bytes(PIPELINE[-1](graph)) <= Dag(graph).peak(legal)


UNARY = ("relu", "sigmoid", "negative", "square", "copy", "relu6")


@st.composite
def random_graph(draw):
    """A DAG over 4-D values mixing spatial, elementwise, view and reduction operators."""
    b = Build(draw(st.integers(0, 99)))
    n, c = draw(st.sampled_from([(1, 4), (2, 3)]))
    x = b.input(n, c, 4, 4)
    pool = [x]
    for _ in range(draw(st.integers(3, 12))):
        v = draw(st.sampled_from(pool))
        shape = b.values[v].shape
        kind = draw(st.integers(0, 8))
        if kind == 0:
            w = b.randn(c, c, 3, 3)
            out = b.conv(v, b.const(w, "w") if draw(st.booleans()) else b.param(c, c, 3, 3))
        elif kind == 1:
            out = b.op(draw(st.sampled_from(UNARY)), v)
        elif kind == 2:
            op = draw(st.sampled_from(["add", "multiply", "subtract"]))
            out = b.op(op, v, draw(st.sampled_from(pool)))
        elif kind == 3:
            op = draw(st.sampled_from(["add", "multiply"]))
            out = b.op(op, v, b.const(b.randn(1, c, 1, 1)))
        elif kind == 4:
            m = b.op("mean", v, shape=(n, c, 1, 1), axes=(2, 3), keepdims=True)
            out = b.op("broadcast_to", m, shape=shape)
        elif kind == 5:
            flat = b.op("reshape", v, shape=(n, c, 16))
            turned = b.op("permute_dims", flat, shape=(n, 16, c), axes=(0, 2, 1))
            back = b.op("permute_dims", b.op("relu", turned), shape=(n, c, 16), axes=(0, 2, 1))
            out = b.op("reshape", back, shape=shape)
        elif kind == 6:
            cut = dict(begin=(0, 1, 0, 0), end=(n, c, 4, 4), strides=(1, 1, 1, 1))
            part = b.op("strided_slice", v, shape=(n, c - 1, 4, 4), **cut)
            first = dict(begin=(0, 0, 0, 0), end=(n, 1, 4, 4), strides=(1, 1, 1, 1))
            other = b.op("strided_slice", v, shape=(n, 1, 4, 4), **first)
            out = b.op("concat", part, other, shape=shape, axis=1)
        elif kind == 7:
            out = b.op("add", v, b.const(np.float32(draw(st.sampled_from([0.0, 0.5])))))
        else:
            out = b.op("softmax", v, axis=draw(st.sampled_from([1, 3])))
        pool.append(out)
    last = pool[-1]
    total = b.op("sum", last, shape=(), axes=(0, 1, 2, 3))
    w = next(iter(b.params), None)
    updates = {}
    if w is not None:
        dw = b.conv(x, last, op="conv2d_weight_grad", shape=b.values[w].shape, pad=1)
        lr = b.scalar("lr")
        state = b.param(*b.values[w].shape, name=f"momentum/{w}", kind="optimizer")
        updates[state] = b.op("add", b.op("multiply", state, b.const(np.float32(0.9))), dw)
        step = b.op("multiply", updates[state], lr)
        updates[w] = b.op("subtract", w, step)
        # a reader of the old weight behind the update, and an update that depends on it
        dx = b.conv(last, w, op="conv2d_input_grad", shape=(n, c, 4, 4), pad=1)
        if draw(st.booleans()):
            dx = b.op("multiply", dx, b.op("sum", step, shape=(), axes=(0, 1, 2, 3)))
        bias = b.param(c, name="bias")
        db = b.op("sum", dx, shape=(c,), axes=(0, 2, 3))
        updates[bias] = b.op("subtract", bias, b.op("multiply", db, lr))
    return b.graph(updates, loss=total, output=last)


@settings(max_examples=40, deadline=None)
@given(random_graph())
def test_random_graphs_keep_their_numbers(graph):
    same_numbers(graph, run_passes(graph), 2e-3)
