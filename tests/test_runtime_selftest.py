"""The recorded self-test: at a rate where two correct programs agree."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from graphs import Build

from pocktvm.ir.model import Input
from pocktvm.recorded import STEADY, first_losses, last_bits_off, record_self_test, spread


def step_and_predict(frequency: float):
    """w moves by lr sin(frequency w): the higher, the less two correct programs agree."""
    graphs = []
    for outputs in ("loss", "output"):
        b = Build()
        x, w = b.input(4), b.param(4)
        total = b.op("sum", b.op("multiply", x, w), shape=(), axes=(0,), keepdims=False)
        updates = {}
        if outputs == "loss":
            wave = b.op("sin", b.op("multiply", w, b.const(np.float32(frequency))))
            updates[w] = b.op("subtract", w, b.op("multiply", wave, b.scalar("lr")))
        graphs.append(b.graph(updates, **{outputs: total}))
    return graphs, (Input("x", (4,), "float32"),)


@pytest.mark.parametrize(("frequency", "factor"), [(1.0, 1.0), (1e4, 1e-3)])
def test_the_rate_is_lowered_until_rounding_does_not_decide(frequency, factor):
    graphs, inputs = step_and_predict(frequency)
    test = record_self_test(graphs, inputs, SimpleNamespace(lr=1.0))
    assert test.lr == pytest.approx(factor)
    assert test.losses == first_losses(graphs[0], test.inputs, test.lr, 3)
    nearby = first_losses(graphs[0], test.inputs, test.lr, 3, last_bits_off(graphs[0]))
    assert 0 <= spread(test.losses, nearby) <= STEADY
    assert len(set(test.losses)) == 3  # it still learns: a wrong gradient shows


def test_parameters_are_moved_by_their_last_bit():
    (step, _), _ = step_and_predict(1.0)
    for name, moved in last_bits_off(step).items():
        value = step.params[name].value
        assert moved.dtype == np.float32 and (moved != value).any()
        np.testing.assert_allclose(moved, value, rtol=2.4e-7)


def test_the_spread_is_relative_to_at_least_a_hundredth():
    assert spread((1.0, 2.0), (1.0, 2.002)) == pytest.approx(1e-3)
    assert spread((1e-4,), (2e-4,)) == pytest.approx(1e-2)
