"""The whole pipeline: a small MobileNet block's training step, and random graphs."""

import pytest
from graphs import ops, same_numbers
from hypothesis import given, settings
from sample_graphs import inverted_residual_step, random_graph

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


@settings(max_examples=40, deadline=None)
@given(random_graph())
def test_random_graphs_keep_their_numbers(graph):
    same_numbers(graph, run_passes(graph), 2e-3)
