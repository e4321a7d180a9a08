"""Making values again: lower peaks, the same numbers, and never after an operand has changed."""

from __future__ import annotations

import pytest
import torch
from equality import REDUCED, Work, assert_losses_equal, assert_updates_equal, our_run, torch_run
from graphs import Build, same_numbers
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_graphs import inverted_residual_step, perceptron, random_graph

import pocktvm
from pocktvm.errors import PockError
from pocktvm.ir.graph import Graph
from pocktvm.levers import peak
from pocktvm.passes import run_passes
from pocktvm.passes.order import order
from pocktvm.passes.rematerialize import AGAIN, is_again, rematerialize

pytestmark = pytest.mark.build


def chain(depth: int = 6) -> Graph:
    """Optimised; every layer's input is kept for its weight."""
    return run_passes(perceptron(depth, rows=256))


@pytest.mark.parametrize("share", [0.8, 0.6, 0.55])
def test_the_peak_falls_under_the_limit_and_numbers_stay(share):
    graph = chain()
    limit = int(share * peak(graph))
    fewer = rematerialize(graph, limit)
    assert peak(fewer) <= limit < peak(graph)
    clones = [n for n in fewer.nodes if is_again(n)]
    assert clones and len(fewer.nodes) == len(graph.nodes) + len(clones)
    same_numbers(graph, fewer)
    same_numbers(graph, order(fewer))
    assert peak(order(fewer)) <= peak(graph)


def test_a_graph_that_fits_stays_as_it_is():
    graph = chain(3)
    assert rematerialize(graph, peak(graph)).nodes == graph.nodes


def test_what_cannot_be_reached_is_approached_with_the_same_numbers():
    graph = run_passes(inverted_residual_step(size=12))
    fewer = rematerialize(graph, 1)
    assert peak(fewer) <= peak(graph)
    same_numbers(graph, fewer)


def test_nothing_is_made_again_from_a_parameter_that_has_changed():
    """w is updated in the middle; what depends on it must be kept behind that."""
    b = Build()
    x, w, lr = b.input(512, 8), b.param(8, 8), b.scalar("lr")
    h = b.op("matmul", x, w, shape=(512, 8), transpose_a=False, transpose_b=False)
    small = b.op("sum", h, shape=(8,), axes=(0,), keepdims=False)
    new = b.op("subtract", w, b.op("multiply", small, lr))
    wide = b.input(512, 64, name="wide")
    s = b.op("sum", b.op("exp", wide), shape=(), axes=(0, 1), keepdims=False)
    loss = b.op("sum", b.op("multiply", h, s), shape=(), axes=(0, 1), keepdims=False)
    graph = b.graph({w: new}, loss=loss)
    fewer = rematerialize(graph, 1)
    position = {o: i for i, n in enumerate(fewer.nodes) for o in n.outputs}
    assert position.get(h + AGAIN, -1) < position[new]
    same_numbers(graph, fewer)


@settings(max_examples=12, deadline=None)
@given(random_graph(), st.floats(0.3, 0.95))
def test_random_graphs_keep_their_numbers(graph, share):
    graph = run_passes(graph)
    fewer = rematerialize(graph, int(share * peak(graph)))
    assert peak(fewer) <= peak(graph)
    same_numbers(graph, fewer, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["mobilenetv2", "bert"])
def test_a_build_with_a_budget_trains_as_torch(model):
    """Two thirds of the arena beside the weights, ten of torch's steps."""
    work = Work.of(*REDUCED[model][:1], 8)
    options = dict(scheme="full", optimizer=pocktvm.SGD(lr=1e-3), published=work.source.scheme)
    module, inputs = work.source.module, work.source.example_inputs
    plain = pocktvm.compile(module, inputs, **options).plan
    kept = plain.arena_bytes - plain.persistent_bytes
    limit = plain.total_bytes - kept // 3
    artifact = pocktvm.compile(module, inputs, budget=limit, **options)
    assert artifact.plan.total_bytes <= limit < plain.total_bytes
    assert artifact.trade.kernels > 0 and artifact.trade.measured and artifact.trade.flops > 0
    losses, state = our_run(artifact, work, 1e-3)
    theirs, their_state = torch_run(
        work, artifact.updated, lambda p: torch.optim.SGD(p, lr=1e-3)
    )
    assert_losses_equal(losses, theirs)
    assert_updates_equal(state, their_state, module.state_dict(), artifact.updated)
    with pytest.raises(PockError, match=r"--budget|Largest savings|Train fewer"):
        pocktvm.compile(module, inputs, budget=plain.persistent_bytes // 2, **options)
