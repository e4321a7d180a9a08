"""Embeddings learn row by row where the optimizer leaves the other rows alone."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import Build, ops, same_numbers

from pocktvm.passes import run_passes
from pocktvm.passes.scatter_updates import scatter_updates


def lookup(momentum: bool = False, again: bool = False):
    """loss = sum((table[ids] * c)²) and its step."""
    b = Build()
    ids, table, lr = b.input(3, 4, dtype="int32", name="ids"), b.param(7, 5), b.scalar("lr")
    c = b.const(b.randn(5))
    x = b.op("take", table, ids, shape=(3, 4, 5), axis=0, mode="clip")
    y = b.op("multiply", x, c)
    loss = b.op("sum", b.op("square", y), shape=(), axes=(0, 1, 2), keepdims=False)
    dy = b.op("multiply", b.op("multiply", y, b.const(np.float32(2))), c, role="gradient")
    grad = b.op("take_grad", dy, ids, shape=(7, 5), axis=0, padding_idx=-1, role="gradient")
    updates = {}
    if momentum:
        state = b.param(7, 5, name="momentum", kind="optimizer")
        grad = b.op("add", b.op("multiply", state, b.const(np.float32(0.9))), grad)
        updates[state] = grad
    updates[table] = b.op("subtract", table, b.op("multiply", lr, grad))
    if again:
        other = b.param(7, 5, name="other")
        updates[other] = b.op("subtract", other, grad)
    return b.graph(updates, loss=loss)


def test_plain_sgd_touches_the_rows_looked_up():
    graph = lookup()
    scattered = scatter_updates(graph)
    assert "take_grad" not in ops(scattered) and ops(scattered).count("take_update") == 1
    same_numbers(graph, scattered)
    same_numbers(graph, run_passes(graph))


@pytest.mark.parametrize("how", [{"momentum": True}, {"again": True}])
def test_a_gradient_that_others_need_stays_dense(how):
    graph = lookup(**how)
    assert ops(scatter_updates(graph)) == ops(graph)
