"""fuse and order: what joins, what does not, and how much memory an order needs."""

import numpy as np
from graphs import Build, same_numbers

from pocktvm.passes.fuse import fuse
from pocktvm.passes.order import order, peak_bytes


def groups(b, updates=None, **outputs):
    graph = b.graph(updates, **outputs)
    after = fuse(graph)
    same_numbers(graph, after)
    return [[n.op for n in node.kernel_nodes()] for node in after.nodes], after


def test_epilogue_with_residual_and_kept_value():
    b = Build()
    x, w = b.input(4, 8), b.param(8, 8)
    bias, skip = b.param(8), b.input(4, 8)
    z = b.op("add", b.op("matmul", x, w, shape=(4, 8)), bias)
    y = b.op("add", b.op("gelu", z), skip)
    found, after = groups(b, y=y, z=z)
    assert found == [["matmul", "add", "gelu", "add"]]
    (group,) = after.nodes
    assert group.outputs == (z, y) and group.anchor.op == "matmul"
    assert group.attrs["kind"] == "matmul"


def test_a_late_operand_moves_a_group_nobody_else_reads():
    b = Build()
    x, w, v = b.input(4, 8), b.param(8, 8), b.param(8, 8)
    first = b.op("matmul", x, w, shape=(4, 8))
    second = b.op("matmul", first, v, shape=(4, 8))
    late = b.op("softmax", b.op("matmul", x, v, shape=(4, 8)), axis=1)
    found, _ = groups(b, y=b.op("add", second, late))
    assert found == [["matmul"], ["matmul"], ["softmax"], ["matmul", "add"]]


def test_no_cycle_through_another_kernel():
    b = Build()
    x, w = b.input(4, 4), b.param(4, 4)
    first = b.op("matmul", x, w, shape=(4, 4))
    around = b.op("softmax", first, axis=1)
    found, _ = groups(b, y=b.op("add", first, around))
    assert found == [["matmul"], ["softmax"], ["add"]]


def test_other_shapes_stay_out():
    b = Build()
    x, w = b.input(4, 1), b.param(1, 1)
    first = b.op("matmul", x, w, shape=(4, 1))
    found, _ = groups(b, y=b.op("add", first, b.input(4, 8)))
    assert found == [["matmul"], ["add"]]


def test_reduction_takes_prologue_and_update():
    b = Build()
    x, dy, lr = b.input(6, 4), b.input(6, 4), b.scalar()
    g = b.param(4)
    dg = b.op("sum", b.op("multiply", dy, b.op("tanh", x)), shape=(4,), axes=(0,))
    found, after = groups(b, {g: b.op("subtract", g, b.op("multiply", dg, lr))})
    assert found == [["tanh", "multiply", "sum", "multiply", "subtract"]]
    assert after.nodes[0].anchor.op == "sum"


def test_prologue_someone_else_reads_stays():
    b = Build()
    x = b.input(6, 4)
    t = b.op("tanh", x)
    found, _ = groups(b, y=b.op("sum", t, shape=(4,), axes=(0,)), t=t)
    assert found == [["tanh"], ["sum"]]


def test_adam_is_one_kernel_behind_its_gradient():
    b = Build()
    x, dy, lr = b.input(6, 4), b.input(6, 3), b.scalar()
    c1 = b.scalar("bias_correction:0.9")
    w = b.param(4, 3)
    m = b.param(4, 3, name="exp_avg/w", kind="optimizer")
    v = b.param(4, 3, name="exp_avg_sq/w", kind="optimizer")
    b.params[v] = type(b.params[v])(v, np.abs(b.params[v].value), "optimizer")
    dw = b.op("matmul", x, dy, shape=(4, 3), transpose_a=True)
    decay, rest = b.const(np.float32(0.9)), b.const(np.float32(0.1))
    new_m = b.op("add", b.op("multiply", m, decay), b.op("multiply", dw, rest))
    square = b.op("multiply", b.op("multiply", dw, dw), rest)
    new_v = b.op("add", b.op("multiply", v, decay), square)
    root = b.op("add", b.op("sqrt", new_v), b.const(np.float32(1e-8)))
    change = b.op("divide", b.op("multiply", b.op("divide", new_m, c1), lr), root)
    new_w = b.op("subtract", w, change)
    found, after = groups(b, {w: new_w, m: new_m, v: new_v})
    assert len(found) == 1 and found[0].count("matmul") == 1
    assert set(after.nodes[0].outputs) == {new_w, new_m, new_v}


def test_too_many_operands_are_two_kernels():
    b = Build()
    y = b.input(4)
    for _ in range(14):
        y = b.op("add", y, b.input(4))
    found, _ = groups(b, y=y)
    assert len(found) == 2


def test_update_waits_for_the_reader_of_the_old_value():
    """dw joins its update, and the step's later reader of w still sees the old one."""
    b = Build()
    x, dy, lr = b.input(6, 4), b.input(6, 3), b.scalar()
    w = b.param(4, 3)
    dw = b.op("matmul", x, dy, shape=(4, 3), transpose_a=True)
    new = b.op("subtract", w, b.op("multiply", dw, lr))
    dx = b.op("matmul", dy, w, shape=(6, 4), transpose_b=True)
    graph = order(fuse(b.graph({w: new}, y=b.op("sum", dx, shape=(), axes=(0, 1)))))
    at = {o: i for i, n in enumerate(graph.nodes) for o in n.outputs}
    assert at[new] > at[dx]


def test_order_runs_updates_early_and_late_nodes_late():
    b = Build()
    x, lr = b.input(64, 64), b.scalar()
    weights = [b.param(64, 64) for _ in range(4)]
    scaled = [b.op("multiply", w, b.const(np.float32(2))) for w in weights]
    gradients = []
    d = x
    for s in scaled:
        gradients.append(b.op("matmul", d, x, shape=(64, 64), transpose_a=True))
        d = b.op("matmul", d, s, shape=(64, 64))
    updates = {}
    for w, g in zip(weights, gradients, strict=True):
        updates[w] = b.op("subtract", w, b.op("multiply", g, lr))
    graph = b.graph(updates, y=b.op("sum", d, shape=(), axes=(0, 1)))
    after = order(graph)
    same_numbers(graph, after)
    tensor = 64 * 64 * 4
    assert peak_bytes(graph) >= 7 * tensor
    assert peak_bytes(after) <= 4 * tensor
    assert peak_bytes(order(fuse(graph))) <= 3 * tensor


def test_the_anchor_comes_first_in_its_body():
    """Everything behind the anchor has its result's shape: what kernels call the epilogue."""
    b = Build()
    x, w, m = b.input(4, 8), b.param(8, 8), b.input(4, 8)
    side = b.op("tanh", m)
    y = b.op("add", side, b.op("matmul", x, w, shape=(4, 8)))
    found, after = groups(b, y=y)
    assert found == [["matmul", "tanh", "add"]] and after.nodes[0].attrs["anchor"] == 0
