"""Saved activations in a byte: kernels round as the reference does, training hardly notices."""

from __future__ import annotations

import shutil
from unittest import mock

import numpy as np
import pytest
import torch
from equality import REDUCED, Work, narrow_beside_plain
from graphs import group_of, ops, same_numbers
from sample_graphs import perceptron
from schedule_harness import host, rng, run_rule, typed
from test_masks_built import batch, network

import pocktvm
from pocktvm.ir.graph import Node
from pocktvm.levers import peak
from pocktvm.passes import run_passes
from pocktvm.passes.narrow_saved import narrow_saved
from pocktvm.reference import eval_node
from pocktvm.schedule.blocks import row_blocks
from pocktvm.schedule.rule import Task
from pocktvm.schedule.rules.depthwise import DepthwiseWeightGrad
from pocktvm.schedule.rules.elementwise import Elementwise
from pocktvm.schedule.rules.matmul import Matmul
from pocktvm.targets import load_target

pytestmark = pytest.mark.build


def magnitudes(shape):
    """Every size of number, zeros, denormals, and halves of a step."""
    x = rng.standard_normal(shape) * 10.0 ** rng.integers(-12, 8, shape)
    x = np.where(rng.random(shape) < 0.2, rng.integers(-130, 130, shape) / 2, x)
    return np.where(rng.random(shape) < 0.1, 0, x).astype(np.float32)


def run(node, types, rule, lanes, arrays):
    task = Task(node, types, {}, frozenset(), host(lanes))
    return run_rule(task, rule, arrays), eval_node(node, types, arrays)


@pytest.mark.parametrize("lanes, channels", [(4, 15), (4, 16), (8, 21), (16, 48), (16, 61)])
def test_blocks_round_as_the_reference_does(lanes, channels):
    shape = (5, 7, channels)
    exponents = (5, 7, row_blocks(channels, lanes))
    types = typed(x=shape, z=shape, q=(shape, "int8"), e=(exponents, "uint8"))
    x = magnitudes(shape)
    pack = Node("pack_i8", ("x",), ("q", "e"), {"group": lanes})
    got, want = run(pack, types, Elementwise(), lanes, {"x": x})
    np.testing.assert_array_equal(got[1], want[1])
    np.testing.assert_array_equal(got[0], want[0])
    unpack = Node("unpack_i8", ("q", "e"), ("z",), {"group": lanes})
    (got_z,), (want_z,) = run(unpack, types, Elementwise(), lanes, {"q": got[0], "e": got[1]})
    np.testing.assert_array_equal(got_z, want_z)
    largest = 2.0 ** (got[1].astype(int).max(-1, keepdims=True) - 127)
    assert (np.abs(got_z - x) <= largest / 64).all()  # of the largest block of the row


@pytest.mark.parametrize("lanes", [1, 4, 16])
def test_a_byte_of_relu6(lanes):
    shape = (3, 37)
    types = typed(x=shape, y=(shape, "uint8"), z=shape)
    x = np.clip(magnitudes(shape), 0, 6)
    pack = Node("pack_u8", ("x",), ("y",), {"top": 6.0})
    (got,), (want,) = run(pack, types, Elementwise(), lanes, {"x": x})
    np.testing.assert_array_equal(got, want)
    unpack = Node("unpack_u8", ("y",), ("z",), {"top": 6.0})
    (z,), (want,) = run(unpack, types, Elementwise(), lanes, {"y": got})
    np.testing.assert_allclose(z, want, rtol=1e-6)
    assert np.abs(z - x).max() <= 6 / 510 + 1e-6


@pytest.mark.parametrize("lanes", [4, 16])
def test_behind_a_product(lanes):
    shape = (9, 83)
    types = typed(a=(9, 7), b=(7, 83), c=shape, e=((9, row_blocks(83, lanes)), "uint8"),
                   q=(shape, "int8"))  # fmt: skip
    product = Node("matmul", ("a", "b"), ("c",), dict(transpose_a=False, transpose_b=False))
    pack = Node("pack_i8", ("c",), ("q", "e"), {"group": lanes})
    arrays = {n: rng.standard_normal(types[n].shape).astype(np.float32) for n in "ab"}
    node = group_of(product, pack, outputs=("c", "q", "e"))
    (c, q, e), _ = run(node, types, Matmul(), lanes, arrays)
    again = eval_node(pack, types, {"c": c})
    np.testing.assert_array_equal(q, again[0])
    np.testing.assert_array_equal(e, again[1])


@pytest.mark.parametrize("lanes", [4, 16])
@pytest.mark.parametrize("op", ["unpack_u8", "unpack_bf16"])
def test_a_depthwise_gradient_widens_what_it_reads(op, lanes):
    x, dw = (2, 6, 5, 13), (3, 3, 1, 13)
    dtype = "uint8" if op == "unpack_u8" else "uint16"
    types = typed(x=x, dy=x, dw=dw, q=(x, dtype))
    attrs = dict(strides=(1, 1), padding=(1, 1, 1, 1), dilation=(1, 1), groups=13, layout="NHWC")
    gradient = Node("conv2d_weight_grad", ("x", "dy"), ("dw",), attrs)
    body = (Node(op, ("q",), ("x",), {"top": 6.0}), gradient)
    node = Node("group", ("q", "dy"), ("dw",), {"anchor": 1, "kind": gradient.op}, "", body)
    arrays = {"dy": rng.standard_normal(x).astype(np.float32)}
    arrays["q"] = (rng.integers(0, 256, x) + (0 if op == "unpack_u8" else 16200)).astype(dtype)
    (got,), (want,) = run(node, types, DepthwiseWeightGrad(), lanes, arrays)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)


def test_weights_operands_take_a_byte_and_the_rest_two():
    graph = perceptron()
    narrow = narrow_saved(graph, "int8")
    same_numbers(graph, narrow, 2e-2)
    found = ops(narrow)
    assert found.count("pack_i8") == found.count("unpack_i8") >= 3
    assert found.count("pack_bf16") >= 4  # what gelu's gradients read
    half, byte = run_passes(graph, saved="bf16"), run_passes(graph, saved="int8")
    same_numbers(graph, byte, 2e-2)
    assert peak(byte) < 0.95 * peak(half)
    scalar = run_passes(graph, load_target("hexagon-v67"), saved="int8")
    assert not [n for n in scalar.nodes for p in n.kernel_nodes() if p.op == "pack_i8"]


@pytest.mark.parametrize("model", [pytest.param("mobilenetv2", marks=pytest.mark.slow), "bert"])
def test_a_build_trains_nearly_alike_in_less_memory(model, monkeypatch, tmp_path):
    """Fifteen steps within hundredths, every pass checked against the narrowed graph, and fifty to
    about as low a loss: MobileNetV2 takes a path of its own."""
    monkeypatch.setenv("POCKTVM_CHECK", "1")
    work = Work.of(REDUCED[model][0], 16)
    _, ratio, ours, theirs = narrow_beside_plain(work, "int8", tmp_path / "narrow")
    assert ratio < 0.75
    assert ours[0] == theirs[0] and ours != theirs
    np.testing.assert_allclose(ours[:15], theirs[:15], rtol=0, atol=2e-2)
    assert ours[-1] < ours[0] and abs(ours[-1] - theirs[-1]) < 0.1 * theirs[0]


@pytest.mark.emulated
@pytest.mark.parametrize("target", ["rpi4", "armv7"])
def test_other_devices_train_nearly_like_torch(target, tmp_path):
    """Prime numbers of channels; every value narrowed."""
    emulator = load_target(target).emulator[0]
    if shutil.which(emulator) is None:
        pytest.skip(f"{emulator} is not installed")
    x, y = batch()
    tiny = {"SMALL": 0, "SPAN": 1}
    with mock.patch.multiple("pocktvm.passes.narrow_saved", **tiny), \
            mock.patch.multiple("pocktvm.passes.save_masks", **tiny):  # fmt: skip
        artifact = pocktvm.compile(
            network(), (torch.from_numpy(x),), target=target, scheme="full", saved="int8",
            optimizer=pocktvm.SGD(lr=0.01), out=tmp_path / target,
        )  # fmt: skip
    calls = (artifact.path / "manifest.json").read_text()
    assert all(f"{p}_{form}" in calls for p in ("pack", "unpack") for form in ("u8", "i8", "bf16"))
    trainer, module = artifact.load(), network()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    for _ in range(5):
        loss = torch.nn.functional.cross_entropy(module(torch.from_numpy(x)), torch.from_numpy(y))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert abs(trainer.step(x, y) - loss.item()) < 5e-3
