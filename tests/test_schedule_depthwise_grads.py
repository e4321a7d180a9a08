"""Both gradients of a depthwise convolution in one kernel, against the reference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from schedule_harness import host, rng, run_rule, typed
from test_schedule_depthwise import SHAPES, TARGETS, geometry

from benchmarks.inner_loops import inner_loops
from pocktvm.ir.graph import Node
from pocktvm.reference import eval_node
from pocktvm.schedule.compile_kernel import aliasing_admitted, compile_object
from pocktvm.schedule.rule import Task, defaults
from pocktvm.schedule.rules.depthwise_grads import DepthwiseGrads
from pocktvm.targets import load_target

pytestmark = pytest.mark.build
KIND = "depthwise_grads"
SUM = {"axes": (0, 1, 2), "keepdims": False}


def group(kind, inputs, outputs, *body):
    return Node("group", inputs, outputs, {"anchor": 0, "kind": kind}, "", body)


def gradients(shape, masked=True, sums=("dy", "z")):
    """The joined group of one layer with its types: relu6 in front, the update of w behind."""
    x, w, y, attrs = geometry(shape)
    types = typed(x=x, dy=y, w=w, dw=w, w2=w, dx=x, z=x, sd=(x[3],), sz=(x[3],), b=(x[3],),
                   b2=(x[3],))  # fmt: skip
    parts = [group("conv2d_weight_grad", ("x", "dy", "w"), ("w2",),
                   Node("conv2d_weight_grad", ("x", "dy"), ("dw",), attrs),
                   Node("subtract", ("w", "dw"), ("w2",)))]  # fmt: skip
    if "dy" in sums:
        parts.append(group("sum", ("dy", "b"), ("b2",), Node("sum", ("dy",), ("sd",), SUM),
                           Node("subtract", ("b", "sd"), ("b2",))))  # fmt: skip
    dx = Node("conv2d_input_grad", ("dy", "w"), ("dx",), attrs)
    mask = Node("relu6_grad", ("dx", "x"), ("z",))
    z = "z" if masked else "dx"
    parts.append(group("conv2d_input_grad", (*dx.inputs, "x"), ("z",), dx, mask) if masked else dx)
    at = len(parts) - 1
    if "z" in sums:
        parts.append(Node("sum", (z,), ("sz",), SUM))
    made = [o for part in parts for o in part.outputs]
    read = dict.fromkeys(i for part in parts for i in part.inputs if i not in made)
    attrs = {"anchor": at, "kind": KIND}
    return Node("group", tuple(read), tuple(made), attrs, "", tuple(parts)), types


def check(node, types, target, **about):
    task = Task(node, types, {}, frozenset(), target)
    arrays = {n: rng.standard_normal(types[n].shape).astype(np.float32) for n in node.inputs}
    wanted = eval_node(node, types, arrays)
    for name, got, want in zip(
        node.outputs, run_rule(task, DepthwiseGrads(), arrays, **about), wanted, strict=True
    ):
        scale = max(1.0, float(np.abs(want).max()))
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * scale, err_msg=name)


@pytest.mark.parametrize("number, shape", enumerate(SHAPES))
def test_all_gradients_of_odd_shapes(number, shape):
    node, types = gradients(shape)
    target = host(*TARGETS[number % len(TARGETS)])
    task = Task(node, types, {}, frozenset(), target)
    if DepthwiseGrads().decline(task):  # borders that no tap of dy's sum reaches
        node, types = gradients(shape, sums=("z",))
    check(node, types, target)


@pytest.mark.parametrize("about", [{"masked": False}, {"sums": ()}])
def test_parts_may_be_absent(about):
    check(*gradients(SHAPES[2], **about), host(8))


@pytest.mark.parametrize("shape", [SHAPES[0], (3, 21, 23, 24, *SHAPES[2][4:])])
@pytest.mark.parametrize("cores", [1, 2, 3])
def test_bands_of_rows_add_up_and_results_may_lie_over_operands(shape, cores):
    """The work of these shapes is below what threads are woken for, so lanes are few."""
    target = host(4)
    target = replace(target, isa=replace(target.isa, cores=cores, vector_bytes=4))
    node, types = gradients((4, *shape[1:]))
    if cores > 1:
        task = Task(node, types, {}, frozenset(), target)
        emitted = DepthwiseGrads().emit(task, {"pixels": 4, "vectors": 1})
        assert emitted.workspaces[0][0] % cores == 0
        names = {(node.outputs[o], node.inputs[i]) for o, i in emitted.inplace}
        assert {("z", "x"), ("w2", "w"), ("b2", "b")} <= names
    check(node, types, target, overwrite=True)


def test_a_sum_of_dy_that_no_tap_covers_is_declined():
    """A 2x2 kernel over a border of one: each tap misses a row of dy."""
    shape = (1, 3, 3, 4, (2, 2), (1, 1), (1, 1, 1, 1), (1, 1))
    node, types = gradients(shape)
    reason = DepthwiseGrads().decline(Task(node, types, {}, frozenset(), host(4)))
    assert reason is not None and "no tap" in reason
    check(*gradients(shape, sums=("z",)), host(4))


@pytest.mark.parametrize("shape", [(2, 32, 32, 48), (2, 8, 8, 48), (2, 16, 16, 24)])
def test_nothing_is_spilled_on_cortex_a72(shape):
    stride = (2, 2) if shape[-1] == 24 else (1, 1)
    node, types = gradients((*shape, (3, 3), stride, (1, 1, 1, 1), (1, 1)))
    task = Task(node, types, {}, frozenset(), load_target("rpi4"))
    rule = DepthwiseGrads()
    func = aliasing_admitted(rule.emit(task, defaults(rule.knobs(task))))
    loops = inner_loops(compile_object(func, "kernel", task))
    assert loops and not [loop for loop in loops if loop.spills]
    assert max(loop.density for loop in loops) >= (0.3 if stride[0] > 1 else 0.4)
