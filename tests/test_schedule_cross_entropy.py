"""Cross-entropy kernels against torch, for every option and place of the class axis."""

from __future__ import annotations

import numpy as np
import pytest
from schedule_harness import check_rule, host, run_rule

from pocktvm.ir.graph import Node, Value
from pocktvm.reference import eval_node
from pocktvm.schedule.rule import Task
from pocktvm.schedule.rules.cross_entropy import CrossEntropy, CrossEntropyGrad

pytestmark = pytest.mark.build

CASES = [
    ((5, 10), 1, {}, False),
    ((1, 2), 1, {}, False),
    ((7, 133), 1, {"label_smoothing": 0.1}, False),
    ((6, 11), 1, {"ignore_index": 3, "label_smoothing": 0.2}, True),
    ((2, 13, 3, 5), 1, {"ignore_index": 0}, False),
    ((3, 6, 4), 1, {"label_smoothing": 0.3}, True),
]


@pytest.mark.parametrize(("shape", "axis", "options", "weighted"), CASES)
@pytest.mark.parametrize("lanes", [1, 4, 16])
def test_cross_entropy_and_its_gradient(shape, axis, options, weighted, lanes):
    attrs = {"axis": axis, "label_smoothing": 0.0, "ignore_index": -100, **options}
    rng = np.random.default_rng(0)
    labels = rng.integers(0, shape[1], (shape[0], *shape[2:])).astype(np.int32)
    labels.flat[0] = 1  # at least one row counts
    arrays = {"y": labels, "dloss": np.array(0.7, np.float32)}
    values = {
        "x": Value("x", shape),
        "y": Value("y", labels.shape, "int32"),
        "dloss": Value("dloss", ()),
        "loss": Value("loss", ()),
        "dx": Value("dx", shape),
    }
    weight: tuple[str, ...] = ()
    if weighted:
        values["w"] = Value("w", (shape[1],))
        arrays["w"] = rng.uniform(0.5, 2, shape[1]).astype(np.float32)
        weight = ("w",)
    forward = Node("cross_entropy", ("x", "y", *weight), ("loss",), attrs)
    check_rule(forward, values, CrossEntropy(), host(lanes), arrays=arrays)
    backward = Node("cross_entropy_grad", ("x", "y", "dloss", *weight), ("dx",), attrs)
    check_rule(backward, values, CrossEntropyGrad(), host(lanes), arrays=arrays)
    both = Node("cross_entropy_grad", backward.inputs, ("dx", "loss"), attrs)
    check_rule(both, values, CrossEntropyGrad(), host(lanes), arrays=arrays)
    arrays["x"] = rng.standard_normal(shape).astype(np.float32)
    task = Task(both, values, {}, frozenset(), host(lanes))
    over = run_rule(task, CrossEntropyGrad(), arrays, overwrite=True)
    for got, want in zip(over, eval_node(both, values, arrays), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
