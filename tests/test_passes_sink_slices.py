"""sink_slices: rows nobody reads are not computed, forward or backward."""

import numpy as np
from graphs import Build, ops, same_numbers
from hypothesis import given, settings
from hypothesis import strategies as st

from pocktvm.passes.cuts import cut_attrs, cut_of, cut_shape, reshaped_cut
from pocktvm.passes.simplify import simplify
from pocktvm.passes.sink_slices import sink_slices

B, S, D, H = 2, 8, 4, 6
TOKEN = dict(begin=(0, 0, 0), end=(B, 1, D), strides=(1, 1, 1))


def tokens(b, x, w, activation):
    """activation(x w^T + bias) over tokens, as an importer writes it."""
    out = b.values[w].shape[0]
    rows = b.op("reshape", x, shape=(B * S, b.values[x].shape[2]))
    y = b.op("matmul", rows, w, shape=(B * S, out), transpose_b=True)
    y = b.op("add", b.op("reshape", y, shape=(B, S, out)), b.param(out, name="bias"))
    return y, b.op(activation, y)


def largest(graph):
    """Elements of the largest value a node computes."""
    return max(graph.values[o].size for n in graph.nodes if n.op != "reshape" for o in n.outputs)


def test_a_classifier_on_the_first_token():
    b = Build()
    x = b.input(B, S, D)
    w1, w2 = b.param(H, D, name="w1"), b.param(D, H, name="w2")
    lr = b.scalar()
    z, u = tokens(b, x, w1, "gelu")
    _, y = tokens(b, u, w2, "tanh")
    first = b.op("strided_slice", y, shape=(B, 1, D), **TOKEN)
    loss = b.op("mean", b.op("square", first), shape=(), axes=(0, 1, 2))
    d = b.op("multiply", first, b.const(np.float32(2 / (B * D))))
    d = b.op("strided_slice_grad", d, shape=(B, S, D), **TOKEN)
    d = b.op("tanh_grad", d, y)
    d2 = b.op("reshape", d, shape=(B * S, D))
    u2 = b.op("reshape", u, shape=(B * S, H))
    dw2 = b.op("matmul", d2, u2, shape=(D, H), transpose_a=True)
    du = b.op("reshape", b.op("matmul", d2, w2, shape=(B * S, H)), shape=(B, S, H))
    dz = b.op("gelu_grad", du, z)
    db = b.op("sum", dz, shape=(H,), axes=(0, 1))
    x2 = b.op("reshape", x, shape=(B * S, D))
    dz2 = b.op("reshape", dz, shape=(B * S, H))
    dw1 = b.op("matmul", dz2, x2, shape=(H, D), transpose_a=True)
    pairs = [(w1, dw1), (w2, dw2), ("bias", db)]
    updates = {p: b.op("subtract", p, b.op("multiply", g, lr)) for p, g in pairs}
    graph = b.graph(updates, loss=loss)
    after = simplify(sink_slices(simplify(graph)))
    same_numbers(graph, after)
    assert "strided_slice_grad" not in ops(after)
    assert largest(after) <= max(B * H, D * H)
    assert ops(after).count("strided_slice") == 1


def test_two_different_readers_keep_the_whole():
    b = Build()
    y = b.op("relu", b.input(B, S, D))
    first = b.op("strided_slice", y, shape=(B, 1, D), **TOKEN)
    graph = b.graph(first=first, total=b.op("sum", y, shape=(), axes=(0, 1, 2)))
    assert ops(sink_slices(graph)) == ops(graph)


def test_most_of_a_tensor_stays_where_it_is():
    b = Build()
    cut = dict(begin=(0, 1, 0), end=(B, S, D), strides=(1, 1, 1))
    y = b.op("strided_slice", b.op("relu", b.input(B, S, D)), shape=(B, S - 1, D), **cut)
    graph = b.graph(y=y)
    assert ops(sink_slices(graph)) == ["relu", "strided_slice"]


def test_a_share_of_a_weight_gradient_reads_a_share_of_its_operands():
    b = Build()
    x, dy = b.input(2, 8, 5, 5), b.input(2, 4, 5, 5, name="dy")
    dw = b.conv(x, dy, op="conv2d_weight_grad", shape=(4, 8, 3, 3), pad=1)
    cut = dict(begin=(0, 0, 0, 0), end=(4, 2, 3, 3), strides=(1, 1, 1, 1))
    a, c = b.input(6, 8, name="a"), b.input(6, 4, name="c")
    dm = b.op("matmul", c, a, shape=(4, 8), transpose_a=True)
    part = b.op("strided_slice", dm, shape=(4, 2), begin=(0, 0), end=(4, 2), strides=(1, 1))
    graph = b.graph(dw=b.op("strided_slice", dw, shape=(4, 2, 3, 3), **cut), dm=part)
    after = sink_slices(graph)
    same_numbers(graph, after)
    assert ops(after) == ["strided_slice", "conv2d_weight_grad", "strided_slice", "matmul"]


def test_rows_of_batched_attention():
    b = Build()
    q, k = b.input(2, 3, S, 4, name="q"), b.input(2, 3, S, 4, name="k")
    scores = b.op("matmul", q, k, shape=(2, 3, S, S), transpose_b=True)
    p = b.op("softmax", scores, axis=3)
    y = b.op("matmul", p, k, shape=(2, 3, S, 4))
    y = b.op("permute_dims", y, shape=(2, S, 3, 4), axes=(0, 2, 1, 3))
    y = b.op("reshape", y, shape=(2 * S, 12))
    rows = dict(begin=(3, 0), end=(2 * S, 12), strides=(S, 1))
    y = b.op("strided_slice", y, shape=(2, 12), **rows)
    after = sink_slices(graph := b.graph(y=y))
    same_numbers(graph, after)
    assert largest(after) == 2 * 3 * S


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_reshaped_cut_keeps_the_same_elements(data):
    before = tuple(data.draw(st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=4)))
    count = int(np.prod(before))
    divisors = [d for d in range(1, count + 1) if count % d == 0]
    lead = data.draw(st.sampled_from(divisors))
    after = (lead, count // lead)
    cut = []
    for n in before:
        begin = data.draw(st.integers(0, n - 1))
        cut.append((begin, data.draw(st.integers(begin + 1, n)), data.draw(st.integers(1, 2))))
    cut = cut_of(
        dict(zip(("begin", "end", "strides"), zip(*cut, strict=True), strict=True)), before
    )
    moved = reshaped_cut(cut, before, after)
    if moved is None:
        return

    def take(array, c):
        attrs = cut_attrs(c, array.shape)
        return array[tuple(slice(*r) for r in zip(*attrs.values(), strict=True))]

    array = np.arange(count)
    expected = take(array.reshape(before), cut).ravel()
    got = take(array.reshape(after), moved)
    assert got.shape == cut_shape(moved, after)
    np.testing.assert_array_equal(got.ravel(), expected)
