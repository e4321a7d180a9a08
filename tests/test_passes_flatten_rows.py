"""flatten_rows on the feed-forward half of an encoder layer, forward and backward."""

import numpy as np
from graphs import Build, ops, same_numbers

from pocktvm.passes import run_passes
from pocktvm.passes.flatten_rows import flatten_rows
from pocktvm.passes.simplify import simplify

B, S, D, H = 2, 3, 4, 8


def linear(b, x, w, bias):
    rows, out = b.op("reshape", x, shape=(B * S, b.values[x].shape[-1])), b.values[w].shape[0]
    y = b.op("matmul", rows, w, shape=(B * S, out), transpose_b=True)
    return rows, b.op("add", b.op("reshape", y, shape=(B, S, out)), bias)


def feed_forward():
    """layer_norm(x + linear(gelu(linear(x)))), its loss, gradients and SGD updates."""
    b = Build()
    x, lr = b.input(B, S, D), b.scalar()
    w1, b1 = b.param(H, D, name="w1"), b.param(H, name="b1")
    w2, b2 = b.const(b.randn(D, H), "w2"), b.param(D, name="b2")
    g, beta = b.param(D, name="g"), b.param(D, name="beta")
    _, z = linear(b, x, w1, b1)
    _, y = linear(b, b.op("gelu", z), w2, b2)
    h = b.op("add", y, x)
    mean, rstd = b._name("mean_"), b._name("rstd_")
    out = b.op("layer_norm", h, g, beta, shape=(B, S, D), axes=(2,), eps=1e-5)
    node = b.nodes.pop()
    for name in (mean, rstd):
        b.values[name] = type(b.values[out])(name, (B, S, 1))
    b.nodes.append(type(node)("layer_norm", node.inputs, (out, mean, rstd), node.attrs))
    loss = b.op("mean", b.op("square", out), shape=(), axes=(0, 1, 2))
    dy = b.op("multiply", out, b.const(np.float32(2 / (B * S * D))))
    xhat = b.op("multiply", b.op("subtract", h, mean), rstd)
    dg = b.op("sum", b.op("multiply", dy, xhat), shape=(D,), axes=(0, 1))
    dbeta = b.op("sum", dy, shape=(D,), axes=(0, 1))
    dh = b.op("layer_norm_grad", dy, h, g, mean, rstd, shape=(B, S, D), axes=(2,))
    db2 = b.op("sum", dh, shape=(D,), axes=(0, 1))
    dh2 = b.op("reshape", dh, shape=(B * S, D))
    du = b.op("reshape", b.op("matmul", dh2, w2, shape=(B * S, H)), shape=(B, S, H))
    dz = b.op("gelu_grad", du, z)
    db1 = b.op("sum", dz, shape=(H,), axes=(0, 1))
    dz2 = b.op("reshape", dz, shape=(B * S, H))
    x2 = b.op("reshape", x, shape=(B * S, D))
    dw1 = b.op("matmul", dz2, x2, shape=(H, D), transpose_a=True)
    pairs = [(w1, dw1), (b1, db1), (b2, db2), (g, dg), (beta, dbeta)]
    updates = {p: b.op("subtract", p, b.op("multiply", d, lr)) for p, d in pairs}
    return b.graph(updates, loss=loss, output=out)


def test_an_encoder_layer_becomes_rows():
    graph = feed_forward()
    after = simplify(flatten_rows(simplify(graph)))
    same_numbers(graph, after, 1e-4)
    shapes = [after.values[n.outputs[0]].shape for n in after.nodes if n.op != "reshape"]
    assert all(len(s) < 3 for s in shapes)
    fused = run_passes(graph)
    same_numbers(graph, fused, 1e-4)
    found = [[n.op for n in node.kernel_nodes()] for node in fused.nodes]
    assert ["matmul", "add", "gelu"] in found and ["matmul", "add", "add"] in found
    assert ["matmul", "gelu_grad"] in found
    assert ["subtract", "multiply", "multiply", "sum", "multiply", "subtract"] in found
    assert len([f for f in found if f != ["reshape"]]) == 12, found


def test_batched_products_keep_their_axes():
    b = Build()
    x = b.input(4, 5, 3)
    s = b.op("matmul", x, x, shape=(4, 5, 5), transpose_b=True)
    s = b.op("softmax", b.op("multiply", s, b.const(np.float32(0.5))), axis=2)
    s = b.op("add", s, b.op("reshape", b.input(20, 5), shape=(4, 5, 5)))
    graph = b.graph(y=s)
    assert ops(flatten_rows(graph)) == ops(graph)


def test_an_operand_of_another_shape_declines():
    b = Build()
    x = b.input(6, 4)
    y = b.op("reshape", x, shape=(2, 3, 4))
    y = b.op("add", y, b.const(b.randn(1, 3, 4)))  # a position embedding
    graph = b.graph(y=b.op("relu", y))
    after = simplify(flatten_rows(graph))
    same_numbers(graph, after)
    assert ops(after) == ["reshape", "add", "relu"]
