"""The gradients of a depthwise convolution become one kernel, with the numbers of its parts."""

from __future__ import annotations

import pytest
from graphs import Build, same_numbers
from schedule_harness import host

from pocktvm.passes.assign_layout import assign_layout
from pocktvm.passes.fuse import fuse
from pocktvm.passes.join_gradients import join_gradients
from pocktvm.passes.liveness import overwritable
from pocktvm.passes.order import order, peak_bytes
from pocktvm.passes.simplify import simplify
from pocktvm.schedule.gpu.rules import GPU_RULES
from pocktvm.schedule.rule import Task
from pocktvm.schedule.rules import RULES

SHAPE = (2, 6, 9, 7)


def layer(learn=True, shifts=True, groups=6, tangled=False):
    """x = relu6(p), y = depthwise(x): both gradients from a loss over relu6(y), and updates."""
    b = Build()
    lr, updates = b.scalar("lr"), {}
    x = b.op("relu6", b.op("exp", b.input(*SHAPE)))
    w = b.param(6, 6 // groups, 3, 3) if learn else b.const(b.randn(6, 6 // groups, 3, 3))
    y = b.op("relu6", b.conv(x, w, groups=groups))
    loss = b.op("sum", y, shape=(), axes=(0, 1, 2, 3), keepdims=False)
    dy = b.op("relu6_grad", b.op("multiply", y, loss), y)
    if learn:
        dw = b.conv(x, dy, groups=groups, op="conv2d_weight_grad", shape=b.values[w].shape)
        updates[w] = b.op("subtract", w, b.op("multiply", lr, dw))
    if tangled:  # what the input gradient reads depends on the weight gradient
        w = b.op("multiply", w, b.op("exp", dw))
    z = b.op("relu6_grad", b.conv(dy, w, groups=groups, op="conv2d_input_grad", shape=SHAPE), x)
    for gradient in (dy, z) if shifts else ():
        shift = b.param(6)
        db = b.op("sum", gradient, shape=(6,), axes=(0, 2, 3), keepdims=False)
        updates[shift] = b.op("subtract", shift, b.op("multiply", lr, db))
    return order(fuse(simplify(assign_layout(b.graph(updates, loss=loss, z=z)))))


def joined(graph):
    return [n for n in graph.nodes if n.attrs.get("kind") == "depthwise_grads"]


@pytest.mark.parametrize("about, parts", [({}, 4), ({"shifts": False}, 2)])
def test_what_reads_the_same_values_is_joined(about, parts):
    graph = layer(**about)
    result = order(join_gradients(graph).check())
    (node,) = joined(result)
    assert len(node.body) == parts
    same_numbers(graph, result)
    assert peak_bytes(result) <= peak_bytes(graph)


@pytest.mark.parametrize(
    "about", [{"groups": 1}, {"tangled": True}, {"learn": False}]
)
def test_other_convolutions_and_parts_that_need_each_other_stay_apart(about):
    graph = layer(**about)
    assert not joined(join_gradients(graph))


def test_the_result_may_lie_over_the_activation():
    graph = join_gradients(layer())
    (node,) = joined(graph)
    walk = node.anchor.body
    pairs = overwritable(node, graph.values)
    assert (walk[-1].outputs[0], walk[-1].inputs[1]) in pairs
    assert all(name != walk[0].inputs[0] for _, name in pairs)


def test_no_other_rule_takes_the_group():
    graph = join_gradients(layer())
    (node,) = joined(graph)
    task = Task(node, {n: graph.values[n] for n in node.names()}, {}, frozenset(), host(8))
    takers = [r.name for r in (*RULES, *GPU_RULES) if r.decline(task) is None]
    assert takers == ["depthwise_grads"]
