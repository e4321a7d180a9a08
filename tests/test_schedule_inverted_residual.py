"""Inverted residual blocks: recognised where nothing learns, written as one kernel."""

import dataclasses

import numpy as np
import pytest
from graphs import Build, same_numbers
from schedule_harness import host, run_rule

from pocktvm.ir.graph import Node
from pocktvm.passes.assign_layout import assign_layout
from pocktvm.passes.fold_constants import fold_constants
from pocktvm.passes.fuse import fuse
from pocktvm.passes.fuse_blocks import KIND, fuse_blocks
from pocktvm.passes.simplify import simplify
from pocktvm.reference import eval_node
from pocktvm.schedule.rule import Task
from pocktvm.schedule.rules.inverted_residual import InvertedResidual


def block_graph(
    *, batch=2, channels=8, hidden=24, outputs=8, size=(18, 18), stride=1, kernel=3, act="relu6",
    residual=True, expand=True, learns=None, pad=None,
):  # fmt: skip
    """One block in front of a mean, as it comes from differentiation; `learns` a name to train."""
    b = Build()
    x = b.input(batch, channels, *size)
    hidden = hidden if expand else channels

    def weight(name, *shape):
        if learns == name:
            return b.param(*shape, name=name)
        return b.const(b.randn(*shape), name)

    def epilogue(y, width, name):
        y = b.op("add", y, b.const(b.randn(1, width, 1, 1), name), shape=b.values[y].shape)
        return b.op(act, y) if act and name != "b2" else y

    y = x
    if expand:
        y = epilogue(b.conv(y, weight("w1", hidden, channels, 1, 1)), hidden, "b1")
    wd = weight("wd", hidden, 1, kernel, kernel)
    y = epilogue(b.conv(y, wd, stride=stride, groups=hidden, pad=pad), hidden, "bd")
    y = epilogue(b.conv(y, weight("w2", outputs, hidden, 1, 1)), outputs, "b2")
    if residual:
        y = b.op("add", y, x)
    graph = b.graph(output=b.op("relu", y))
    for function in (simplify, assign_layout, fold_constants, simplify, fuse):
        graph = function(graph)
    return graph


def only_block(graph):
    """The block's node, the fused graph's only group of that kind."""
    (node,) = (n for n in fuse_blocks(graph).nodes if n.attrs.get("kind") == KIND)
    return node


def check_block(graph, target, **knobs):
    """The kernel's numbers against the reference's, on a target with caches to suit."""
    node = only_block(graph)
    frozen = frozenset(i for i, n in enumerate(node.inputs) if n in graph.consts)
    values = {n: graph.values[n] for n in node.names()}
    literals = {n: graph.consts[n].item() for n in values if graph.values[n].shape == () and
                n in graph.consts}  # fmt: skip
    node = dataclasses.replace(node, inputs=tuple(n for n in node.inputs if n not in literals))
    task = Task(node, values, literals, frozen, target)
    rng = np.random.default_rng(3)
    arrays = {
        n: graph.consts[n] if n in graph.consts
        else rng.standard_normal(values[n].shape).astype(np.float32)
        for n in node.inputs
    }  # fmt: skip
    (expected,) = eval_node(node, values, arrays | {k: np.float32(v) for k, v in literals.items()})
    (got,) = run_rule(task, InvertedResidual(), arrays, **knobs)
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5 * scale)


def with_cache(target, l2_bytes, cores=2):
    """A target whose second-level cache has this size."""
    isa = dataclasses.replace(target.isa, l2_bytes=l2_bytes, cores=cores)
    return dataclasses.replace(target, isa=isa)


CASES = [
    {},
    {"stride": 2, "residual": False, "outputs": 12, "size": (32, 34)},
    {"expand": False, "channels": 16, "outputs": 16},
    {"act": "relu", "size": (17, 19), "batch": 3},
    {"act": "hardswish", "hidden": 13, "channels": 5, "outputs": 5, "size": (16, 21)},
    {"act": None, "kernel": 5, "residual": False, "size": (35, 33), "stride": 2, "outputs": 7},
    {"kernel": 3, "stride": 3, "size": (49, 48), "residual": False, "outputs": 9, "pad": 0},
    {"stride": 4, "size": (66, 65), "residual": False, "batch": 1},
    {"size": (40, 16), "batch": 1, "hidden": 48},
    {"kernel": 7, "size": (16, 16), "batch": 1, "act": "silu"},
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: ",".join(map(str, c.items())) or "plain")
@pytest.mark.parametrize(("lanes", "lane_fma", "cores"), [(8, False, 2), (4, True, 4)])
def test_one_kernel_gives_the_reference_numbers(case, lanes, lane_fma, cores):
    target = host(lanes, lane_fma)
    graph = block_graph(**case)
    node = only_block(graph)
    saved = sum(graph.values[p.outputs[0]].nbytes for p in node.body[:-1])
    # a cache that the block's values overflow and its rows do not, so that the rule takes it
    check_block(graph, with_cache(target, saved - 1, cores))


def test_the_pass_keeps_the_numbers_and_the_parts():
    graph = block_graph()
    after = fuse_blocks(graph)
    same_numbers(graph, after)
    node = only_block(graph)
    assert [part.attrs.get("kind") for part in node.body] == ["conv2d"] * 3
    assert [n.op for n in node.kernel_nodes()].count("conv2d") == 3
    assert len(after.nodes) == len(graph.nodes) - 2


@pytest.mark.parametrize(
    "change",
    [
        {"learns": "w1"},
        {"learns": "wd"},
        {"learns": "w2"},
        {"size": (8, 8)},  # rows too short
        {"size": (30, 15)},
    ],
)
def test_the_pass_declines(change):
    graph = block_graph(**change)
    kinds = [n.attrs.get("kind") for n in fuse_blocks(graph).nodes]
    expected = change.get("learns") == "w1"  # then the depthwise and the projection still are one
    assert (KIND in kinds) == expected


def test_a_value_read_elsewhere_is_kept():
    b = Build()
    x = b.input(2, 8, 16, 16)
    d = b.conv(x, b.const(b.randn(8, 1, 3, 3)), groups=8)
    y = b.conv(d, b.const(b.randn(8, 8, 1, 1)))
    graph = b.graph(output=b.op("add", y, b.op("exp", d)))
    for function in (simplify, assign_layout, fold_constants, simplify, fuse):
        graph = function(graph)
    assert fuse_blocks(graph) is graph


def test_the_rule_declines_what_does_not_pay():
    node = only_block(block_graph())
    graph = block_graph()
    frozen = frozenset(i for i, n in enumerate(node.inputs) if n in graph.consts)
    values = {n: graph.values[n] for n in node.names()}

    def reason(l2_bytes, cores=2):
        target = with_cache(host(8), l2_bytes, cores)
        return InvertedResidual().decline(Task(node, values, {}, frozen, target))

    assert reason(32 * 1024) is None
    assert "stay in cache anyway" in reason(1 << 20)
    assert "do not fit" in reason(4096)
    other = Task(Node("relu", ("a",), ("b",)), {}, {}, frozenset(), host(8))
    assert InvertedResidual().decline(other) == "no inverted residual"
