"""The loss comes out of the kernel of its gradient, where nothing reads it earlier."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import Build, ops, same_numbers

from pocktvm.passes import run_passes
from pocktvm.passes.join_loss import join_loss

OPTIONS = {"axis": 1, "label_smoothing": 0.0, "ignore_index": -100}


def head(early: bool = False, other: bool = False, smoothing: float = 0.0):
    """A linear head, its loss and the head's update; `early`: the gradient waits for the loss."""
    b = Build()
    x, y = b.input(4, 5), b.input(4, dtype="int32", name="y")
    w, lr = b.param(5, 7), b.scalar("lr")
    attrs = {**OPTIONS, "label_smoothing": smoothing}
    z = b.op("matmul", x, w, shape=(4, 7), transpose_a=False, transpose_b=False)
    loss = b.op("cross_entropy", z, y, shape=(), **attrs)
    d = b.op("exp", loss) if early else b.const(np.float32(1))
    attrs = {**attrs, "ignore_index": 1} if other else attrs
    dz = b.op("cross_entropy_grad", z, y, d, shape=(4, 7), role="gradient", **attrs)
    dw = b.op("matmul", x, dz, shape=(5, 7), transpose_a=True, transpose_b=False)
    return b.graph({w: b.op("subtract", w, b.op("multiply", lr, dw))}, loss=loss)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_one_node_gives_both(smoothing):
    graph = head(smoothing=smoothing)
    joined = join_loss(graph)
    assert "cross_entropy" not in ops(joined)
    assert [len(n.outputs) for n in joined.nodes if n.op == "cross_entropy_grad"] == [2]
    same_numbers(graph, joined)
    same_numbers(graph, run_passes(graph))


@pytest.mark.parametrize("how", [{"early": True}, {"other": True}])
def test_a_loss_that_is_needed_earlier_or_differs_stays(how):
    graph = head(**how)
    assert join_loss(graph) is graph
