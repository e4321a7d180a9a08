"""Masks of one bit and places of one byte: the passes, and every kernel that reads or writes them.

The oracle is the reference (its own packing, in torch) and the graph without the passes, whose
numbers must be the same bits.
"""

from __future__ import annotations

import dataclasses
from unittest import mock

import numpy as np
import pytest
from graphs import Build, group_of, ops, same_numbers
from hypothesis import given, settings
from sample_graphs import inverted_residual_step, random_graph
from schedule_harness import host, rng, run_rule, typed

from pocktvm.errors import InternalError
from pocktvm.ir.graph import Graph, Node, Value
from pocktvm.levers import peak
from pocktvm.passes import PIPELINE, run_passes
from pocktvm.passes.index_pools import index_pools
from pocktvm.passes.rematerialize import rematerialize
from pocktvm.passes.save_masks import channels_a_byte, save_masks
from pocktvm.reference import eval_node
from pocktvm.schedule.rule import Task
from pocktvm.schedule.rules.conv import Conv
from pocktvm.schedule.rules.depthwise import DepthwiseConv, DepthwiseInputGrad
from pocktvm.schedule.rules.elementwise import Elementwise
from pocktvm.schedule.rules.matmul import Matmul
from pocktvm.schedule.rules.pool import Pool
from pocktvm.schedule.rules.reduce import Reduce
from pocktvm.targets import load_target

ROWS = [(1, 13), (2, 13), (4, 31), (4, 24), (8, 67), (8, 8), (16, 67), (16, 24)]
TESTS = [{"test": "relu"}, {"test": "relu6"}, {"test": "clip", "min": -1.0, "max": 2.5}]


def packed(shape, lanes):
    group = min(8, lanes)
    return group, (*shape[:-1], -(-shape[-1] // group))


def edges(shape):
    """Halves from -4 to 8: every bound is met, and missed by little."""
    x = rng.integers(-8, 17, shape).astype(np.float32) / 2
    return np.where(rng.random(shape) < 0.1, np.nextafter(x, np.float32(9)), x).astype(np.float32)


def same_bits(node, types, rule, lanes, arrays):
    target = host(lanes)
    for name in node.inputs:
        if name not in arrays:
            arrays[name] = rng.standard_normal(types[name].shape).astype(np.float32)
    task = Task(node, types, {}, frozenset(), target)
    expected = eval_node(node, types, arrays)
    for name, got, want in zip(node.outputs, run_rule(task, rule, arrays), expected, strict=True):
        if types[name].dtype == "uint8":
            np.testing.assert_array_equal(got, want, err_msg=f"{name}, {lanes} lanes")
        else:
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4, err_msg=name)
    return expected


@pytest.mark.build
@pytest.mark.parametrize("lanes, channels", ROWS)
def test_a_mask_is_written_and_read_by_itself(lanes, channels):
    shape = (2, 3, channels)
    group, bits = packed(shape, lanes)
    test = TESTS[channels % 3]
    types = typed(y=shape, m=(bits, "uint8"), d=shape, z=shape, b=(1, 3, 1), o=shape)
    pack = Node("pack_mask", ("y",), ("m",), {"group": group, **test})
    arrays = {"y": edges(shape)}
    (mask,) = same_bits(pack, types, Elementwise(), lanes, arrays)
    apply = Node("apply_mask", ("d", "m"), ("z",), {"group": group, "test": "relu"})
    (dx,) = same_bits(apply, types, Elementwise(), lanes, {"m": mask})
    gradient = Node(f"{test['test']}_grad", ("d", "y"), ("z",), {**test})
    d = rng.standard_normal(shape).astype(np.float32)
    (want,) = eval_node(gradient, types, {"d": d, "y": arrays["y"]})
    (dx,) = eval_node(apply, types, {"d": d, "m": mask})
    np.testing.assert_array_equal(dx, want)
    chain = group_of(None, apply, Node("multiply", ("z", "b"), ("o",)), outputs=("o",))
    same_bits(chain, types, Elementwise(), lanes, {"m": mask})


def spatial(op, source, weight, result, lanes, groups=1):
    """A 3x3 convolution or its input gradient, ReLU6 and mask behind it, or a mask in front."""
    attrs = dict(strides=(1, 1), padding=(1, 1, 1, 1), dilation=(1, 1), groups=groups,
                 layout="NHWC")  # fmt: skip
    group, bits = packed(result, lanes)
    types = typed(x=source, w=weight, c=result, y=result, z=result, m=(bits, "uint8"))
    anchor = Node(op, ("x", "w"), ("c",), attrs)
    if op == "conv2d":
        pack = Node("pack_mask", ("y",), ("m",), {"group": group, "test": "relu6"})
        behind = (Node("relu6", ("c",), ("y",)), pack)
        return group_of(anchor, *behind, outputs=("y", "m")), types, {}
    apply = Node("apply_mask", ("c", "m"), ("z",), {"group": group, "test": "relu"})
    return group_of(anchor, apply, outputs=("z",)), types, {"m": random_bits(bits, group)}


def random_bits(shape, group):
    return rng.integers(0, 1 << group, shape).astype(np.uint8)


@pytest.mark.build
@pytest.mark.parametrize("lanes, channels", [(1, 13), (4, 13), (8, 40), (16, 13), (16, 40)])
def test_behind_convolutions(lanes, channels):
    one = (2, 5, 6, 5)
    many = (2, 5, 6, channels)
    node, types, arrays = spatial("conv2d", one, (3, 3, 5, channels), many, lanes)
    same_bits(node, types, Conv(), lanes, arrays)
    node, types, arrays = spatial("conv2d", many, (3, 3, 1, channels), many, lanes, channels)
    same_bits(node, types, DepthwiseConv(), lanes, arrays)
    node, types, arrays = spatial("conv2d_input_grad", many, (3, 3, 1, channels), many, lanes,
                                  channels)  # fmt: skip
    same_bits(node, types, DepthwiseInputGrad(), lanes, arrays)


@pytest.mark.build
@pytest.mark.parametrize("lanes, rows, columns", [(1, 9, 83), (4, 9, 83), (8, 64, 40), (16, 9, 83)])
def test_behind_products(lanes, rows, columns):
    shape = (rows, columns)
    group, bits = packed(shape, lanes)
    types = typed(a=(rows, 7), b=(7, columns), c=shape, y=shape, m=(bits, "uint8"), z=shape)
    product = Node("matmul", ("a", "b"), ("c",), dict(transpose_a=False, transpose_b=False))
    pack = Node("pack_mask", ("y",), ("m",), {"group": group, "test": "relu"})
    node = group_of(product, Node("relu", ("c",), ("y",)), pack, outputs=("y", "m"))
    same_bits(node, types, Matmul(), lanes, {})
    apply = Node("apply_mask", ("c", "m"), ("z",), {"group": group, "test": "relu"})
    mask = {"m": random_bits(bits, group)}
    node = group_of(product, apply, outputs=("z",))
    same_bits(node, types, Matmul(), lanes, dict(mask))
    types |= typed(b=(columns, 7))
    product = dataclasses.replace(product, attrs=dict(transpose_a=False, transpose_b=True))
    node = group_of(product, apply, outputs=("z",))
    task = Task(node, types, {}, frozenset(), host(lanes))
    assert lanes == 1 or "dot" not in Matmul().knobs(task)["form"].options
    same_bits(node, types, Matmul(), lanes, {"m": mask["m"]})


@pytest.mark.build
@pytest.mark.parametrize("lanes", [1, 16])
@pytest.mark.parametrize("axes, result", [((0, 1), (13,)), ((0, 1, 2), ()), ((2,), (4, 5))])
def test_in_front_of_a_sum(lanes, axes, result):
    shape = (4, 5, 13)
    group, bits = packed(shape, lanes)
    types = typed(d=shape, m=(bits, "uint8"), z=shape, s=result)
    apply = Node("apply_mask", ("d", "m"), ("z",), {"group": group, "test": "relu"})
    total = Node("sum", ("z",), ("s",), {"axes": axes, "keepdims": False})
    node = Node("group", ("d", "m"), ("s",), {"anchor": 1, "kind": "sum"}, "", (apply, total))
    same_bits(node, types, Reduce(), lanes, {"m": random_bits(bits, group)})


POOLS = [  # n, h, w, channels, pool, stride, padding, dilation, lanes
    (2, 8, 8, 32, (3, 3), (2, 2), (1, 1, 1, 1), (1, 1), 16),
    (1, 9, 11, 7, (2, 3), (2, 1), (0, 1, 1, 0), (1, 1), 4),
    (2, 7, 7, 13, (7, 7), (1, 1), (0, 0, 0, 0), (1, 1), 8),
    (1, 10, 9, 5, (3, 2), (1, 3), (1, 0, 2, 1), (2, 3), 1),
]


def test_a_graph_for_wider_vectors_is_refused():
    types = typed(y=(4, 12), m=((4, 2), "uint8"))
    pack = Node("pack_mask", ("y",), ("m",), {"group": 8, "test": "relu"})
    with pytest.raises(InternalError, match="8 channels a byte, 4 in a vector"):
        Elementwise().emit(Task(pack, types, {}, frozenset(), host(4)), {"unroll": 1})


@pytest.mark.build
@pytest.mark.parametrize("case", POOLS)
def test_pools_note_the_first_maximum(case):
    n, h, w, c, pool, stride, padding, dilation, lanes = case
    attrs = dict(pool=pool, strides=stride, padding=padding, dilation=dilation, layout="NHWC")
    out = [
        (size + padding[i] + padding[i + 2] - dilation[i] * (pool[i] - 1) - 1) // stride[i] + 1
        for i, size in enumerate((h, w))
    ]
    x, y = (n, h, w, c), (n, *out, c)
    types = typed(x=x, y=y, i=(y, "uint8"), dy=y, dx=x)
    arrays = {"x": rng.integers(0, 3, x).astype(np.float32)}  # most windows have several maxima
    node = Node("max_pool2d_indexed", ("x",), ("y", "i"), attrs)
    _, places = same_bits(node, types, Pool(), lanes, dict(arrays))
    scatter = Node("max_pool2d_scatter", ("dy", "i"), ("dx",), attrs)
    arrays["dy"] = rng.standard_normal(y).astype(np.float32)
    same_bits(scatter, types, Pool(), lanes, {"i": places, "dy": arrays["dy"]})
    gradient = Node("max_pool2d_grad", ("dy", "x"), ("dx",), attrs)
    task = Task(gradient, types, {}, frozenset(), host(lanes))
    (before,) = run_rule(task, Pool(), arrays)
    task = Task(scatter, types, {}, frozenset(), host(lanes))
    (after,) = run_rule(task, Pool(), {"i": places, "dy": arrays["dy"]})
    np.testing.assert_array_equal(before, after)


def biases(depth: int = 6, rows: int = 256, width: int = 40, act: str = "relu") -> Graph:
    """A perceptron of which only biases learn, before any pass."""
    b = Build()
    x, lr = b.input(rows, width), b.scalar("lr")
    layers, h = [], x
    for i in range(depth):
        w, bias = b.const(b.randn(width, width), f"w{i}"), b.param(width, name=f"b{i}")
        z = b.op("matmul", h, w, shape=(rows, width), transpose_a=False, transpose_b=False)
        h = b.op(act, b.op("add", z, bias))
        layers.append((w, bias, h))
    loss = b.op("mean", h, shape=(), axes=(0, 1), keepdims=False)
    d = b.op("broadcast_to", b.const(np.float32(1 / (rows * width))), shape=(rows, width))
    updates = {}
    for w, bias, y in reversed(layers):
        d = b.op(f"{act}_grad", d, y, role="gradient")
        db = b.op("sum", d, shape=(width,), axes=(0,), keepdims=False)
        updates[bias] = b.op("subtract", bias, b.op("multiply", db, lr))
        d = b.op("matmul", d, w, shape=(rows, width), transpose_a=False, transpose_b=True)
    return b.graph(updates, loss=loss)


def plain(graph):
    with mock.patch("pocktvm.passes.save_masks.SMALL", 1 << 40):
        return run_passes(graph)


@pytest.mark.parametrize("act", ["relu", "relu6"])
def test_what_is_read_as_a_mask_is_kept_as_one(act):
    graph = biases(act=act)
    after = save_masks(graph)
    same_numbers(graph, after, 0)
    found = ops(after)
    # the last layers' are read too soon
    assert found.count("pack_mask") == found.count("apply_mask") >= 4
    assert {after.values[n.outputs[0]].shape for n in after.nodes if n.op == "pack_mask"} == {
        (256, 5)
    }
    whole, bits = plain(graph), run_passes(graph)
    assert peak(bits) < 0.55 * peak(whole)
    same_numbers(whole, bits, 0)
    assert not [n for n in bits.nodes if n.op in ("pack_mask", "apply_mask")]  # all are fused
    same_numbers(bits, rematerialize(bits, peak(bits) * 3 // 4), 1e-6)


def test_it_leaves_alone_what_is_small_short_wanted_or_no_step():
    assert "pack_mask" not in ops(save_masks(biases(rows=64)))
    assert "pack_mask" not in ops(save_masks(biases(depth=1)))
    graph = biases()
    predict = graph.with_(outputs={"output": graph.outputs["loss"]}, updates={})
    assert save_masks(predict) is predict
    trained = inverted_residual_step(trained=True)  # weight gradients want the values
    with mock.patch.multiple("pocktvm.passes.save_masks", SMALL=0, SPAN=1):
        kept = {n.inputs[0] for n in save_masks(trained).nodes if n.op == "pack_mask"}
    wanted = {n.inputs[0] for n in trained.nodes if n.op == "conv2d_weight_grad"}
    assert not kept & wanted


def test_a_slice_that_learns_is_taken_early():
    b = Build()
    x, lr = b.input(64, 128), b.scalar("lr")
    frozen, w = b.const(b.randn(128, 128)), b.param(16, 128)
    y = b.op("relu", b.op("matmul", x, frozen, shape=(64, 128), transpose_a=False,
                          transpose_b=False))  # fmt: skip
    h = y
    for _ in range(4):
        h = b.op("tanh", h)
    loss = b.op("mean", h, shape=(), axes=(0, 1), keepdims=False)
    d = h
    for _ in range(8):
        d = b.op("sigmoid", d)
    part = b.op("strided_slice", y, shape=(64, 16), begin=(0, 0), end=(64, 16), strides=(1, 1))
    dx = b.op("relu_grad", d, y)
    dw = b.op("matmul", part, dx, shape=(16, 128), transpose_a=True, transpose_b=False)
    graph = b.graph({w: b.op("subtract", w, b.op("multiply", dw, lr))}, loss=loss)
    after = save_masks(graph)
    found = ops(after)
    assert found.index("strided_slice") < found.index("tanh") and "pack_mask" in found
    same_numbers(graph, after, 0)


def test_how_many_channels_share_a_byte():
    assert channels_a_byte(None) == 8
    found = {name: channels_a_byte(load_target(name)) for name in ("rpi4", "armv7", "hexagon-v67")}
    assert found == {"rpi4": 4, "armv7": 4, "hexagon-v67": 1}
    assert channels_a_byte(load_target("jetson-orin")) == 1
    graph = biases()
    for name in ("rpi4", "hexagon-v67"):
        same_numbers(graph, run_passes(graph, load_target(name)), 1e-6)


def test_pools_keep_places():
    b = Build()
    x, w = b.input(2, 3, 8, 8), b.param(4, 3, 3, 3)
    attrs = dict(pool=(2, 2), strides=(2, 2), padding=(0, 0, 0, 0), dilation=(1, 1), layout="NCHW")
    h = b.op("relu", b.conv(x, w))
    y = b.op("max_pool2d", h, shape=(2, 4, 4, 4), **attrs)
    loss = b.op("mean", y, shape=(), axes=(0, 1, 2, 3), keepdims=False)
    d = b.op("max_pool2d_grad", y, h, shape=(2, 4, 8, 8), **attrs)
    dw = b.conv(x, b.op("relu_grad", d, h), op="conv2d_weight_grad", shape=(4, 3, 3, 3), pad=1)
    graph = b.graph({w: b.op("subtract", w, dw)}, loss=loss)
    after = index_pools(graph)
    assert {"max_pool2d_indexed", "max_pool2d_scatter"} <= set(ops(after))
    assert not {"max_pool2d", "max_pool2d_grad"} & set(ops(after))
    same_numbers(graph, after, 0)
    assert index_pools(after) is after
    far = graph.with_(nodes=tuple(
        dataclasses.replace(n, attrs={**n.attrs, "pool": (17, 16)}) if "pool" in n.attrs else n
        for n in graph.nodes))  # fmt: skip
    assert index_pools(far) is far


@settings(max_examples=25, deadline=None)
@given(random_graph())
def test_random_graphs_keep_their_numbers_with_masks(graph):
    with mock.patch.multiple("pocktvm.passes.save_masks", SMALL=0, SPAN=1):
        after = run_passes(with_gradients(graph))
    same_numbers(with_gradients(graph), after, 2e-3)


def with_gradients(graph: Graph) -> Graph:
    """The graph with a gradient of each of its activations behind everything else."""
    nodes, values_, updates = list(graph.nodes), dict(graph.values), dict(graph.updates)
    made = [n for n in graph.nodes if n.op in ("relu", "relu6")]
    params = dict(graph.params)
    for k, node in enumerate(made):
        y = graph.values[node.outputs[0]]
        for name, shape in (("d", y.shape), ("g", y.shape), ("s", ()), ("p", ())):
            values_[f"{name}{k}"] = Value(f"{name}{k}", shape)
        axes = tuple(range(len(y.shape)))
        nodes.append(Node("negative", (node.inputs[0],), (f"d{k}",)))
        nodes.append(Node(f"{node.op}_grad", (f"d{k}", y.name), (f"g{k}",)))
        nodes.append(Node("sum", (f"g{k}",), (f"s{k}",), {"axes": axes, "keepdims": False}))
        params[f"p{k}"] = dataclasses.replace(PARAM, name=f"p{k}")
        updates[f"p{k}"] = f"s{k}"
    return graph.with_(nodes=tuple(nodes), values=values_, updates=updates, params=params).check()


PARAM = next(iter(biases(depth=1).params.values()))
PARAM = dataclasses.replace(PARAM, value=np.zeros((), np.float32))
assert index_pools in PIPELINE
