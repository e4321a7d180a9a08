"""Products by Strassen's scheme: storages, chunks, cores, masks, errors, and when it is used."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from schedule_harness import check_rule, host, run_rule
from test_schedule_matmul import matmul, with_epilogue

from pocktvm.ir.graph import Node, Value
from pocktvm.schedule import gemm_strassen
from pocktvm.schedule.gemm import Gemm
from pocktvm.schedule.gemm_strassen import Strassen, divides, saved, short
from pocktvm.schedule.rule import Task, defaults
from pocktvm.schedule.rules.matmul import Matmul
from pocktvm.schedule.rules.products import Products

pytestmark = pytest.mark.build

STORED = [  # A transposed, B transposed, B frozen
    (False, False, True),
    (False, True, True),
    (False, False, False),
    (False, True, False),
    (True, False, False),
]


def with_cores(target, cores, **isa):
    return dataclasses.replace(target, isa=dataclasses.replace(target.isa, cores=cores, **isa))


def plan(task, **knobs):
    rule = Matmul()
    chosen = {**defaults(rule.knobs(task)), **knobs}
    return Strassen.of(task, rule.describe(task), chosen["mr"], chosen["nr"])


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("isa", [(16, False), (8, False), (4, True), (1, False)])
def test_storages(stored, isa):
    ta, tb, frozen = stored
    node, values = with_epilogue(*matmul(34, 96, 72, ta, tb))
    check_rule(node, values, Matmul(), host(*isa), form="strassen",
               frozen=("b",) if frozen else ())  # fmt: skip


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("cores", [1, 2, 3])
def test_chunks_of_rows_and_cores(stored, cores, monkeypatch):
    """Narrower last panels, shorter last chunks and parts, weights asked for ahead."""
    ta, tb, frozen = stored
    monkeypatch.setattr(gemm_strassen, "SUMS_BYTES", 1 << 17)
    monkeypatch.setattr(gemm_strassen, "FEW", 16)
    target = with_cores(host(16), cores, l2_bytes=1 << 18)
    node, values = matmul(298, 544, 320, ta, tb)
    names = ("b",) if frozen else ()
    task = Task(node, values, {}, frozenset([1] if frozen else []), target)
    assert plan(task).chunk < 149
    check_rule(node, values, Matmul(), target, form="strassen", frozen=names)


@pytest.mark.parametrize(("size", "by_rows"), [((16, 256, 512), False), ((512, 96, 64), True)])
def test_cores_share_panels_or_rows_and_give_the_same_bits(size, by_rows):
    node, values = matmul(*size)
    rng = np.random.default_rng(0)
    arrays = {n: rng.standard_normal(values[n].shape).astype(np.float32) for n in ("a", "b")}
    results = []
    for cores in (1, 2):
        task = Task(node, values, {}, frozenset(), with_cores(host(16), cores))
        knobs = {"form": "strassen", "mr": 8, "nr": 48 if by_rows else 32}
        if cores == 2:
            form = plan(task, **knobs)
            assert form.workers == 2 and (form.part < form.chunk) is by_rows
        results.append(run_rule(task, Matmul(), arrays, **knobs)[0])
    np.testing.assert_array_equal(results[0], results[1])


def test_a_mask_behind_it():
    """Bits of eight channels share a byte: panels begin at whole vectors."""
    node, values = matmul(64, 160, 32)
    values = values | {"y": Value("y", (64, 160)), "m": Value("m", (64, 20), "uint8")}
    pack = Node("pack_mask", ("y",), ("m",), {"group": 8, "test": "relu"})
    body = (node, Node("relu", ("c",), ("y",)), pack)
    attrs = {"anchor": 0, "kind": "matmul"}
    group = Node("group", ("a", "b"), ("y", "m"), attrs, "", body)
    check_rule(group, values, Matmul(), host(16), form="strassen")


@pytest.mark.parametrize("k", [256, 1024])
def test_its_error_is_at_most_a_few_times_the_plain_products(k):
    rng = np.random.default_rng(1)
    a = np.maximum(rng.standard_normal((256, k)), 0).astype(np.float32)
    b = rng.standard_normal((k, 256)).astype(np.float32)
    exact = a.astype(np.float64) @ b
    node, values = matmul(256, 256, k)
    task = Task(node, values, {}, frozenset(), host(16))

    def error(form):
        got = run_rule(task, Matmul(), {"a": a, "b": b}, form=form)[0]
        return np.abs(got - exact).max() / np.abs(exact).max()

    assert error("strassen") <= min(3e-6, 4 * error("direct"))


def default_form(m, n, k, target, frozen=True, batch=()):
    node, values = matmul(m, n, k, batch=batch)
    task = Task(node, values, {}, frozenset([1] if frozen else []), target)
    return Matmul().knobs(task)["form"].default


def test_it_is_used_where_all_three_axes_are_long():
    wide = with_cores(host(16), 2, l2_bytes=1 << 20)
    assert default_form(256, 1024, 256, wide) == "strassen"
    assert default_form(256, 1024, 256, wide, frozen=False) == "strassen"
    for size in ((64, 1024, 256), (1024, 64, 256), (1024, 1024, 32), (257, 1024, 256)):
        assert default_form(*size, wide) == "packed", size
    assert default_form(256, 256, 32768, wide) == "packed"  # panels far larger than the cache
    assert default_form(256, 1024, 256, wide, frozen=False, batch=(2,)) != "strassen"
    assert default_form(256, 1024, 256, host(8)) == "packed"  # two multiply-adds a cycle
    assert default_form(1024, 1024, 1024, with_cores(host(8), 2, l2_bytes=1 << 20)) == "strassen"


def test_a_second_result_to_write_takes_its_gain():
    target = with_cores(host(16), 2, l2_bytes=1 << 20)
    node, values = matmul(256, 1024, 256)
    values = values | {"t": Value("t", (256, 1024)), "y": Value("y", (256, 1024))}
    body = (node, Node("exp", ("c",), ("t",)), Node("gelu", ("t",), ("y",)))
    forms = []
    for outputs in (("y",), ("t", "y")):
        group = Node("group", ("a", "b"), outputs, {"anchor": 0, "kind": "matmul"}, "", body)
        task = Task(group, values, {}, frozenset([1]), target)
        forms.append(Matmul().knobs(task)["form"].default)
    assert forms == ["strassen", "packed"]


def test_what_it_saves_grows_with_every_axis():
    isa = host(16).isa
    gemm = Gemm("a", "b", "c", 256, 256, 256)
    assert divides(isa, gemm) and short(isa, gemm) and 0 < saved(isa, gemm) < 12.5
    for axis in ("m", "n", "k"):
        assert saved(isa, dataclasses.replace(gemm, **{axis: 512})) > saved(isa, gemm)
    for changes in ({"m": 255}, {"n": 272}, {"k": 252}, {"batch": 2}, {"causal": "a"}):
        assert not divides(isa, dataclasses.replace(gemm, **changes)), changes


def test_a_product_of_halves_is_no_part_of_a_joined_kernel():
    """Tiles of joined products are dealt out one by one; this form has rounds of its own."""
    target = with_cores(host(16), 2, l2_bytes=1 << 20)
    nodes, values = [], {"a": Value("a", (256, 512))}
    for i in range(2):
        values |= {f"b{i}": Value(f"b{i}", (512, 256)), f"c{i}": Value(f"c{i}", (256, 256))}
        nodes.append(Node("matmul", ("a", f"b{i}"), (f"c{i}",), {}))
    group = Node("group", ("a", "b0", "b1"), ("c0", "c1"), {"anchor": None, "kind": "products"},
                 "", tuple(nodes))  # fmt: skip
    reason = Products().decline(Task(group, values, {}, frozenset(), target))
    assert "strassen" in reason
