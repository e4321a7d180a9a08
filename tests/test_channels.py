"""A tensor that learns in part: the slice is full backprop's, the rest stays, memory follows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from equality import Work, assert_losses_equal
from slices import (
    KINDS,
    OPTIMIZERS,
    STEPS,
    ZOO,
    Narrow,
    assert_slices_equal,
    interpret,
    kinds,
    parts_of,
    torch_slices,
)
from torch import nn

import pocktvm
from pocktvm import memory
from pocktvm.autodiff.differentiate import differentiate
from pocktvm.autodiff.losses import parse_loss
from pocktvm.errors import PockError
from pocktvm.ir.model import Axes, Parameter
from pocktvm.ir.part import Part, choose
from pocktvm.passes import run_passes

pytestmark = pytest.mark.build


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_slice_learns_as_in_full_backprop(optimizer):
    module, inputs, labels = kinds()
    ours, make = OPTIMIZERS[optimizer]
    model, updated = parts_of(module, inputs, KINDS)
    step, _ = differentiate(model, updated, parse_loss("cross_entropy"), ours)
    step = run_passes(step)
    batch = {step.inputs[0]: inputs[0].numpy(), "y": labels.numpy().astype(np.int32)}
    losses, state = interpret(step, batch, ours.lr)
    theirs, their_state, start = torch_slices(module, inputs, labels, updated, make)
    assert_losses_equal(losses, theirs)
    frozen = {n: p.value for n, p in model.parameters.items()}
    assert_slices_equal({**frozen, **state}, their_state, start, updated)
    for name, param in step.params.items():
        if param.kind == "optimizer":
            tensor = name.partition("/")[2]
            part, whole = updated[tensor], start[tensor].shape
            expected = list(whole)
            if isinstance(part, Part):
                expected[part.axis] = len(part.indices)
            assert param.torch_shape == tuple(expected)


def test_only_the_slice_of_a_gradient_is_computed():
    module, inputs, _ = kinds()
    scheme = {k: v for k, v in KINDS.items() if k != "norm.weight"}
    model, updated = parts_of(module, inputs, scheme)
    step, _ = differentiate(model, updated, parse_loss("cross_entropy"), pocktvm.SGD())
    step = run_passes(step)
    whole = {n: p.value.size for n, p in model.parameters.items()}
    shapes = {
        out: step.values[out].size
        for node in step.nodes
        for part in node.kernel_nodes()
        if part.op == "conv2d_weight_grad"
        for out in part.outputs
    }
    assert len(shapes) == 6
    shares = {n: float(part) * whole[n] for n, part in updated.items() if n.count("weight")}
    assert sorted(shapes.values()) == sorted(
        round(shares[f"{n}.weight"]) for n in ("plain", "grouped", "depth", "twice", "up", "line")
    )


def planned(share):
    inputs = (torch.randn(4, 32, 24, 24),)
    scheme = {"blocks.*.0.weight": share} if share else {"fc.*": 1}
    model, updated = parts_of(Narrow().eval(), inputs, scheme)
    graphs = differentiate(model, updated, parse_loss("cross_entropy"), pocktvm.Adam())
    return memory.estimate([run_passes(g) for g in graphs]).by_class


def test_activations_and_optimizer_follow_the_share():
    one = 4 * 32 * 24 * 24 * 4  # bytes of an activation
    full, none = planned(1), planned(0)
    kept = full["activations"] - none["activations"]
    assert kept >= 4 * one
    for share in (0.5, 0.25, [1, 2, 5, 9, 20, 30, 31, 13]):
        part = planned(share)
        ratio = share if isinstance(share, float) else len(share) / 32
        assert part["activations"] - none["activations"] <= kept * ratio + one, share
        assert part["optimizer"] == pytest.approx(full["optimizer"] * ratio, rel=0.05)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_kernels_train_every_kind_of_slice(optimizer):
    module, inputs, labels = kinds()
    ours, make = OPTIMIZERS[optimizer]
    _, updated = parts_of(module, inputs, KINDS)
    compare(module, inputs, labels, KINDS, updated, ours, make)


def compare(module, inputs, labels, scheme, updated, ours, make, tolerance=2e-4):
    artifact = pocktvm.compile(module, inputs, scheme=scheme, optimizer=ours)
    assert artifact.updated == {n: float(p) for n, p in updated.items()}
    with artifact.load() as trainer:
        losses = [trainer.step(*[i.numpy() for i in inputs], labels.numpy()) for _ in range(STEPS)]
        state = trainer.state_dict()
    theirs, their_state, start = torch_slices(module, inputs, labels, updated, make)
    assert_losses_equal(losses, theirs)
    assert_slices_equal(state, their_state, start, updated, tolerance)


@pytest.mark.parametrize("spec", ZOO)
def test_zoo_models_learn_in_part(spec):
    scheme, optimizer = ZOO[spec]
    work = Work.of(spec, 2)
    _, updated = parts_of(work.source.module, work.source.example_inputs, scheme)
    tolerance = 2e-2 if optimizer == "adam" else 1e-3
    ours, make = OPTIMIZERS[optimizer]
    if optimizer == "sgd":
        ours, make = pocktvm.SGD(lr=1e-3), lambda p: torch.optim.SGD(p, lr=1e-3)
    compare(work.source.module, work.x, work.y, scheme, updated, ours, make, tolerance)


# Choosing ----------------------------------------------------------------------------------------


def weight(*shape, seed=0):
    return Parameter("w", np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def test_the_largest_channels_are_chosen():
    w = weight(4, 6, 3, 3)
    w.value[:, [1, 5]] *= 10
    part = choose(w, Axes(), 1 / 3)
    assert (part.axis, part.indices, float(part)) == (1, (1, 5), 2 / 6)
    w.value[2] *= 50
    part = choose(w, Axes(), "out:0.25")
    assert (part.axis, part.indices) == (0, (2,))


def test_a_share_takes_at_least_one_channel_and_all_is_whole():
    assert choose(weight(4, 6), Axes(), 0.01).indices.__len__() == 1
    assert choose(weight(4, 6), Axes(), list(range(6))) == 1.0
    assert not isinstance(choose(weight(4, 6), Axes(), list(range(6))), Part)


def test_sides_of_grouped_and_turned_weights():
    assert choose(weight(12, 1, 3, 3), Axes(groups=6), [0, 5]).indices == (0, 1, 10, 11)
    assert choose(weight(6, 1, 3, 3), Axes(groups=6), "out:0.5").axis == 0
    grouped = choose(weight(8, 3, 1, 1), Axes(groups=2), "out:0.25")
    assert len(grouped.indices) == 2 and grouped.indices[0] < 4 <= grouped.indices[1]
    assert choose(weight(5, 7), Axes(0, 1), [4]).axis == 0
    assert choose(weight(9), Axes(), 0.5).axis == 0


def test_activity_decides_where_it_is_asked():
    w = weight(4, 6)
    activity = {"in": np.array([0, 0, 9, 0, 8, 0.0])}
    assert choose(w, Axes(), "activation:0.34", activity).indices == (2, 4)
    with pytest.raises(PockError, match="--data"):
        choose(w, Axes(), "activation:0.34")


def test_a_channel_that_is_not_there_is_refused_by_number():
    with pytest.raises(PockError, match=r"has 6 input channels.*no 6"):
        choose(weight(4, 6), Axes(), [0, 6])


def test_a_checkpoint_holds_the_slice_and_goes_on_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).eval()
    x, y = torch.randn(4, 6), np.array([0, 2, 1, 1])
    optimizer = pocktvm.SGD(lr=0.1, momentum=0.9)

    def build(indices):
        scheme = {"0.weight": indices, "2.weight": "out:[0, 2]"}
        return pocktvm.compile(module, (x,), scheme=scheme, optimizer=optimizer)

    artifact, path = build([1, 2, 4]), tmp_path / "c.safetensors"
    with artifact.load() as trainer:
        for _ in range(3):
            trainer.step(x.numpy(), y)
        trainer.save(path)
        unbroken = [trainer.step(x.numpy(), y) for _ in range(3)]
        end = trainer.state_dict()
    from safetensors.numpy import load_file

    shapes = {n: a.shape for n, a in load_file(path).items()}
    assert shapes == {
        "0.weight": (8, 3), "momentum_buffer/0.weight": (8, 3),
        "2.weight": (2, 8), "momentum_buffer/2.weight": (2, 8),
    }  # fmt: skip
    with artifact.load() as trainer:
        trainer.load(path)
        assert [trainer.step(x.numpy(), y) for _ in range(3)] == unbroken
        for name, tensor in trainer.state_dict().items():
            assert np.array_equal(tensor, end[name])
            assert tensor.shape == tuple(module.state_dict()[name].shape)
    with build([1, 2, 5]).load() as trainer, pytest.raises(PockError, match="frozen weights"):
        trainer.load(path)
