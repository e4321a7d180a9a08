"""Saved activations as bfloat16: the bits torch gives, a lower peak, nearly the same training."""

from __future__ import annotations

import subprocess
from unittest import mock

import numpy as np
import pytest
import torch
from equality import REDUCED, Work, narrow_beside_plain
from graphs import Build, ops, same_numbers
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_graphs import perceptron, random_graph
from schedule_harness import host, run_rule, typed

from pocktvm.autodiff.differentiate import differentiate
from pocktvm.build import Build as Wanted
from pocktvm.errors import PockError
from pocktvm.fit import check
from pocktvm.identity import label_inputs
from pocktvm.ir.graph import Node
from pocktvm.levers import peak
from pocktvm.manifest import read_manifest, summary
from pocktvm.passes import PIPELINE, pipeline, run_passes
from pocktvm.passes.fuse import fuse
from pocktvm.passes.narrow_saved import SMALL, narrow_saved
from pocktvm.passes.rematerialize import rematerialize
from pocktvm.recorded import STEADY, first_losses, record_self_test, spread
from pocktvm.reference import eval_node
from pocktvm.schedule.rule import Task
from pocktvm.schedule.rules.elementwise import Elementwise
from pocktvm.targets import load_target

pytestmark = pytest.mark.build


def awkward() -> np.ndarray:
    """Random bits, and what rounding gets wrong: ties, carries, denormals, the largest, NaNs."""
    bits = np.random.default_rng(0).integers(0, 2**32, 4000, dtype=np.uint64).astype(np.uint32)
    upper = np.array([0x0000, 0x0001, 0x007F, 0x0080, 0x3F80, 0x3F81, 0x3FFF, 0x7F7F], np.uint32)
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    edges = (upper[:, None] << 16 | lower).reshape(-1)
    special = np.array([0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF], np.uint32)
    found = np.concatenate([bits, edges, special])
    return np.concatenate([found, found | 0x80000000]).view(np.float32)


@pytest.mark.parametrize("lanes", [1, 4, 8, 16])
def test_the_two_operators_round_as_torch_does(lanes):
    x = awkward()
    types = typed(x=x.shape, b=(x.shape, "uint16"), y=x.shape)
    pack, unpack = Node("pack_bf16", ("x",), ("b",)), Node("unpack_bf16", ("b",), ("y",))
    torchs = torch.from_numpy(x).to(torch.bfloat16)
    nan = torchs.isnan().numpy()
    (packed,) = run_rule(Task(pack, types, {}, frozenset(), host(lanes)), Elementwise(), {"x": x})
    np.testing.assert_array_equal(packed[~nan], torchs.view(torch.uint16).numpy()[~nan])
    np.testing.assert_array_equal(eval_node(pack, types, {"x": x})[0][~nan], packed[~nan])
    task = Task(unpack, types, {}, frozenset(), host(lanes))
    (wide,) = run_rule(task, Elementwise(), {"b": packed})
    assert np.isnan(wide[nan]).all() and nan.sum() > 10
    bits = torchs.float().numpy().view(np.uint32)  # denormals and the sign of zero too
    np.testing.assert_array_equal(wide.view(np.uint32)[~nan], bits[~nan])


def test_what_waits_for_the_backward_pass_is_narrow():
    graph = perceptron()
    narrow = narrow_saved(graph)
    same_numbers(graph, narrow, 1e-2)
    found = ops(narrow)
    assert found.count("pack_bf16") == found.count("unpack_bf16") >= 5
    forward = found.index("mean")
    assert "unpack_bf16" not in found[:forward] and "pack_bf16" not in found[forward:]
    packed = {n.inputs[0] for n in narrow.nodes if n.op == "pack_bf16"}
    assert not packed & {*graph.inputs, *graph.params}
    for node in narrow.nodes[narrow.nodes.index(narrow.producers()[graph.outputs["loss"]]) :]:
        assert node.op == "unpack_bf16" or not packed & set(node.inputs)


def test_packing_is_an_epilogue_and_the_peak_falls():
    graph = perceptron()
    plain, narrow = run_passes(graph), run_passes(graph, saved="bf16")
    same_numbers(plain, narrow, 1e-2)
    assert peak(narrow) < 0.75 * peak(plain)
    assert not [n for n in narrow.nodes if n.op == "pack_bf16"]
    made = {o: i for i, n in enumerate(narrow.nodes) for o in n.outputs}
    loss = made[narrow.outputs["loss"]]
    for index, node in enumerate(narrow.nodes):
        widens = any(part.op == "unpack_bf16" for part in node.kernel_nodes())
        assert not (widens and index <= loss), node
    same_numbers(narrow, rematerialize(narrow, peak(narrow) * 3 // 4), 1e-6)


def test_it_leaves_alone_what_is_small_short_or_no_step():
    graph = perceptron(rows=SMALL // 64 // 4)
    assert narrow_saved(graph) is graph
    graph = perceptron(depth=1)  # read right behind the loss
    assert narrow_saved(graph) is graph
    graph = perceptron()
    predict = graph.with_(outputs={"output": graph.outputs["loss"]}, updates={})
    assert narrow_saved(predict) is predict
    assert pipeline() == PIPELINE and len(pipeline("bf16")) == len(PIPELINE) + 1


@settings(max_examples=15, deadline=None)
@given(random_graph(), st.sampled_from(["bf16", "int8"]))
def test_the_passes_behind_it_keep_the_narrow_numbers(graph, saved):
    with mock.patch.multiple("pocktvm.passes.narrow_saved", SMALL=0, SPAN=1):
        narrow = narrow_saved(graph, saved, load_target("rpi4"))
    for function in PIPELINE[PIPELINE.index(fuse) :]:
        narrow, before = function(narrow), narrow
        same_numbers(before, narrow, 2e-3)


def test_what_an_anchor_reads_is_not_part_of_its_epilogue():
    """A wide copy that a product and the sum behind it read."""
    b = Build()
    bits, w = b.input(64, 64, dtype="uint16"), b.param(64, 64)
    wide = b.op("unpack_bf16", bits)
    z = b.op("matmul", wide, w, shape=(64, 64), transpose_a=False, transpose_b=False)
    graph = b.graph(output=b.op("add", z, wide))
    (copy, product) = fuse(graph).nodes
    assert copy.op == "unpack_bf16" and [n.op for n in product.body] == ["matmul", "add"]


@pytest.mark.parametrize("model", ["cnn", "bert"])
def test_a_build_trains_nearly_alike_in_less_memory(model, monkeypatch, tmp_path):
    """Fifty steps within a few thousandths, every pass checked against the narrowed graph, and a
    self-test that the artifact passes."""
    monkeypatch.setenv("POCKTVM_CHECK", "1")
    spec = "cnn:channels=8,depth=4,image=32,classes=5" if model == "cnn" else REDUCED[model][0]
    batch = 16 if model == "cnn" else 32
    work = Work.of(spec, batch)
    narrow, ratio, ours, theirs = narrow_beside_plain(work, "bf16", tmp_path / "narrow")
    assert ratio < 0.85
    done = subprocess.run([narrow.path / "pocktvm-run", narrow.path, "--selftest"], check=False)
    assert done.returncode == 0
    assert ours[0] == theirs[0] and ours != theirs
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-3)
    assert ours[-1] < ours[0]
    facts = summary(narrow.path, read_manifest(narrow.path))
    assert facts["saved"] == "bf16" and "saved activations bf16" in shown(facts)


def shown(facts) -> str:
    import contextlib
    import io

    from pocktvm.cli.show import show

    with contextlib.redirect_stdout(io.StringIO()) as text:
        show(facts)
    return text.getvalue()


def test_the_self_tests_rate_is_one_where_rounding_shows_little():
    """The recorded losses are float32's; at their rate the narrowed reference has them, too."""
    work = Work.of(REDUCED["cnn"][0], 16)
    build = Wanted.of(work.source.module, work.source.example_inputs, optimizer="sgd:lr=0.3")
    model, updated = build.resolve()
    graphs = differentiate(model, updated, build.loss, build.optimizer)
    inputs = label_inputs(model, build.loss)
    test = record_self_test(graphs, inputs, build.optimizer, saved="bf16")
    plain = record_self_test(graphs, inputs, build.optimizer)
    assert test.lr <= plain.lr
    assert test.losses == first_losses(graphs[0], test.inputs, test.lr, 3)
    narrow = narrow_saved(graphs[0])
    assert narrow is not graphs[0]
    assert 0 < spread(test.losses, first_losses(narrow, test.inputs, test.lr, 3)) <= STEADY


def test_who_cannot_have_it_is_told():
    module, x = torch.nn.Linear(4, 2), torch.zeros(3, 4)
    with pytest.raises(PockError, match="kept as float32 or bf16 or int8, not 'int4'"):
        Wanted.of(module, (x,), saved="int4")
    with pytest.raises(PockError, match="is for processors: jetson-orin"):
        Wanted.of(module, (x,), target="jetson-orin", saved="bf16")


def test_a_budget_that_cannot_be_met_names_it():
    module = torch.nn.Sequential(*(torch.nn.Linear(32, 32) for _ in range(6)))
    wanted = Wanted.of(module, (torch.zeros(1, 512, 32),), loss="mse", budget=1 << 16)
    with pytest.raises(PockError, match=r"--saved (bf16|int8) \(-"):
        check(wanted, wanted.programs())
