"""Products of one input become one kernel, with the numbers of its parts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from graphs import Build, same_numbers
from schedule_harness import host, run_rule

from pocktvm.passes.fuse import fuse
from pocktvm.passes.join_products import join_products
from pocktvm.passes.order import order
from pocktvm.reference import eval_node
from pocktvm.schedule.gpu.rules import GPU_RULES
from pocktvm.schedule.rule import Task
from pocktvm.schedule.rules import RULES
from pocktvm.schedule.rules.products import Products

ROWS, WIDTH = 64, 96
PLAIN = {"transpose_a": False, "transpose_b": False}


def attention_input(chain: bool = False, learn: bool = True, rows: int = ROWS):
    """q = x Wq + bq and its like; with `learn` their weights' gradients and updates."""
    b = Build()
    x, lr = b.op("exp", b.input(rows, WIDTH)), b.scalar("lr")
    outputs, weights, updates = {}, {}, {}
    for number, width in enumerate((WIDTH, 48, 48 if not chain else WIDTH)):
        w, bias = b.param(width, WIDTH), b.const(b.randn(width))
        y = b.op("matmul", x, w, shape=(rows, width), transpose_a=False, transpose_b=True)
        y = b.op("add", y, bias)
        if chain and number == 2:
            y = b.op("add", y, outputs["y0"])
        outputs[f"y{number}"], weights[f"y{number}"] = y, w
    if not learn:
        return b.graph(**outputs)
    total = b.const(np.float32(0))
    for y in outputs.values():
        total = b.op("add", total, b.op("sum", y, shape=(), axes=(0, 1), keepdims=False))
    gradients = {y: b.op("multiply", y, total) for y in outputs.values()}
    for key, w in weights.items():
        dw = b.op("matmul", gradients[outputs[key]], x, shape=b.values[w].shape,
                  transpose_a=True, transpose_b=False)  # fmt: skip
        updates[w] = b.op("subtract", w, b.op("multiply", lr, dw))
    return b.graph(updates, loss=total)


def joined(graph):
    return [n for n in graph.nodes if n.attrs.get("kind") == "products"]


def test_products_and_gradients_of_one_input_are_joined():
    graph = order(fuse(attention_input()))
    result = join_products(graph)
    assert sorted(len(n.body) for n in joined(result)) == [3, 3]
    assert {len(n.outputs) for n in joined(result)} == {3}
    same_numbers(graph, result)


def test_a_product_that_reads_another_stays_apart():
    graph = order(fuse(attention_input(chain=True, learn=False)))
    result = join_products(graph)
    assert [len(n.body) for n in joined(result)] == [2]
    same_numbers(graph, result)


def test_nothing_is_joined_where_the_peak_would_grow():
    """Each product is reduced to a row at once: together, all would live at a time."""
    b = Build()
    x = b.op("exp", b.input(8, 16))
    rows = []
    for _ in range(3):
        y = b.op("matmul", x, b.const(b.randn(16, 400)), shape=(8, 400), **PLAIN)
        rows.append(b.op("sum", y, shape=(8,), axes=(1,), keepdims=False))
    graph = order(fuse(b.graph(**{f"y{i}": r for i, r in enumerate(rows)})))
    assert not joined(join_products(graph))


@pytest.mark.build
@pytest.mark.parametrize(("lanes", "frozen"), [(16, True), (16, False), (8, False), (4, True)])
def test_the_joined_kernel_gives_what_its_parts_give(lanes, frozen):
    graph = join_products(order(fuse(attention_input(rows=256))))
    rng, target = np.random.default_rng(0), host(lanes)
    target = replace(target, isa=replace(target.isa, cores=2))
    for node in joined(graph):
        arrays = {n: rng.standard_normal(graph.values[n].shape).astype(np.float32)
                  for n in node.inputs}  # fmt: skip
        weights = [i for i, n in enumerate(node.inputs) if n.startswith("w") and frozen]
        values = {n: graph.values[n] for n in node.names()}
        task = Task(node, values, {}, frozenset(weights), target)
        for got, want in zip(run_rule(task, Products(), arrays),
                             eval_node(node, values, arrays), strict=True):  # fmt: skip
            np.testing.assert_allclose(got, want, atol=2e-4)


def test_one_core_and_large_products_are_left_alone():
    for cores, rows, why in ((1, 256, "core"), (2, 1 << 18, "by itself"), (2, 40, "too little")):
        graph = join_products(order(fuse(attention_input(rows=rows, learn=False))))
        target = host(16)
        target = replace(target, isa=replace(target.isa, cores=cores))
        for node in joined(graph):
            values = {n: graph.values[n] for n in node.names()}
            reason = Products().decline(Task(node, values, {}, frozenset(), target))
            assert reason is not None and why in reason


def test_no_other_rule_takes_the_group():
    b = Build()
    x = b.op("exp", b.input(ROWS, WIDTH))
    plain = [b.op("matmul", x, b.param(WIDTH, 48), shape=(ROWS, 48), **PLAIN) for _ in range(2)]
    graph = join_products(order(fuse(b.graph(y=plain[0], z=plain[1]))))
    (node,) = joined(graph)
    task = Task(node, {n: graph.values[n] for n in node.names()}, {}, frozenset(), host(16))
    takers = [r.name for r in (*RULES, *GPU_RULES) if r.decline(task) is None]
    assert set(takers) <= {"products"}
