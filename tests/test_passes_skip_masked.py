"""Causal attention computes the lower triangle alone, and nothing reads the rest."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import Build, ops, same_numbers
from schedule_harness import host, run_rule

from pocktvm.ir.graph import Node, Value
from pocktvm.passes import run_passes
from pocktvm.passes.skip_masked import skip_masked
from pocktvm.reference import eval_node
from pocktvm.schedule.rule import Task
from pocktvm.schedule.rules.matmul import Matmul
from pocktvm.schedule.rules.rows import RowOperators

HEADS, LENGTH, WIDTH = 2, 6, 4


def causal(length=LENGTH, low=0.0):
    mask = np.full((length, length), low, np.float32)
    mask[np.triu_indices(length, 1)] = -np.inf
    return mask


def attention(mask=None, keep_scores=False, reads=LENGTH):
    """Forward and gradients of softmax(q kT c + mask) v, as autodiff leaves them."""
    b = Build()
    rows, square = (1, HEADS, LENGTH, WIDTH), (1, HEADS, LENGTH, LENGTH)
    q, k, v, d = (b.input(*rows, name=n) for n in "qkvd")
    c = b.const(np.float32(0.5))
    s = b.op("matmul", q, k, shape=square, transpose_a=False, transpose_b=True)
    t = b.op("add", b.op("multiply", s, c), b.const(causal() if mask is None else mask))
    p = b.op("softmax", t, axis=3)
    o = b.op("matmul", p, v, shape=rows, transpose_a=False, transpose_b=False)
    dp = b.op("matmul", d, v, shape=square, transpose_a=False, transpose_b=True)
    ds = b.op("multiply", b.op("softmax_grad", dp, p, axis=3), c)
    dq = b.op("matmul", ds, k, shape=rows, transpose_a=False, transpose_b=False)
    dk = b.op("matmul", ds, q, shape=rows, transpose_a=True, transpose_b=False)
    dv = b.op("matmul", p, d, shape=rows, transpose_a=True, transpose_b=False)
    outputs = {"o": o, "dq": dq, "dk": dk, "dv": dv}
    return b.graph(**outputs, **({"scores": s} if keep_scores else {}))


def marks(graph):
    return [(n.op, n.attrs["causal"]) for n in graph.nodes if "causal" in n.attrs]


def test_every_product_of_causal_attention_is_marked():
    graph = attention()
    marked = skip_masked(graph)
    assert "add" not in ops(marked)
    assert sorted(map(str, marks(marked))) == sorted(map(str, [
        ("matmul", "result"), ("softmax", True), ("matmul", "a"), ("matmul", "result"),
        ("softmax_grad", True), ("matmul", "a"), ("matmul", "a"), ("matmul", "a"),
    ]))  # fmt: skip
    same_numbers(graph, marked)
    same_numbers(graph, run_passes(graph))


def test_scores_that_others_read_are_computed_whole():
    graph = attention(keep_scores=True)
    marked = skip_masked(graph)
    assert ("matmul", "result") in marks(marked)  # the gradient's still is half
    assert marks(marked).count(("matmul", "result")) == 1
    same_numbers(graph, marked)


@pytest.mark.parametrize(
    "mask", [causal(low=0.1), np.zeros((LENGTH, LENGTH), np.float32), causal().T.copy()]
)
def test_other_masks_stay(mask):
    graph = attention(np.maximum(mask, -3e4))
    assert ops(skip_masked(graph)) == ops(graph) and not marks(skip_masked(graph))


@pytest.mark.build
@pytest.mark.parametrize(("length", "lanes"), [(64, 16), (37, 16), (50, 8), (23, 4), (9, 1)])
def test_kernels_neither_read_nor_need_the_upper_triangle(length, lanes):
    rng, square, rows = np.random.default_rng(1), (2, length, length), (2, length, 48)
    below = np.tril(np.ones((length, length), bool))

    def floats(shape):
        return rng.standard_normal(shape).astype(np.float32)

    def run(op, rule, shapes, arrays, knobs=None, **attrs):
        values = {n: Value(n, s) for n, s in shapes.items()}
        *inputs, out = shapes
        node = Node(op, tuple(inputs), (out,), attrs)
        got = run_rule(Task(node, values, {}, frozenset(), host(lanes)), rule, arrays,
                       **(knobs or {}))[0]  # fmt: skip
        return got, eval_node(node, values, arrays)[0]

    def poisoned(shape):
        array = floats(shape)
        array[..., ~below] = np.nan
        return array

    p, want = run("softmax", RowOperators(), {"x": square, "y": square},
                  {"x": poisoned(square)}, axis=2, causal=True)  # fmt: skip
    np.testing.assert_allclose(p, want, atol=1e-6)
    assert (p[..., ~below] == 0).all()
    got, want = run("softmax_grad", RowOperators(), {"dy": square, "y": square, "dx": square},
                    {"dy": poisoned(square), "y": p}, axis=2, causal=True)  # fmt: skip
    np.testing.assert_allclose(got, want, atol=1e-6)
    for transposed in (False, True):
        for form in ("direct", "local"):
            got, want = run("matmul", Matmul(), {"p": square, "v": rows, "o": rows},
                            {"p": p, "v": floats(rows)}, {"form": form},
                            transpose_a=transposed, causal="a")  # fmt: skip
            np.testing.assert_allclose(got, want, atol=1e-5)
    got, want = run("matmul", Matmul(), {"q": rows, "k": rows, "s": square},
                    {"q": floats(rows), "k": floats(rows)}, transpose_b=True,
                    causal="result")  # fmt: skip
    np.testing.assert_allclose(got[..., below], want[..., below], atol=1e-4)
