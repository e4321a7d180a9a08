"""A tensor that learns in part: the slice is full backprop's, the rest stays, memory follows."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from equality import Work, assert_losses_equal
from torch import nn

import pocktvm
from pocktvm import memory
from pocktvm.autodiff.differentiate import differentiate
from pocktvm.autodiff.losses import parse_loss
from pocktvm.errors import PockError
from pocktvm.frontend.source import import_model
from pocktvm.ir.model import Axes, Parameter
from pocktvm.ir.part import Part, choose
from pocktvm.ir.scheme import Scheme
from pocktvm.passes import run_passes
from pocktvm.reference import evaluate

pytestmark = pytest.mark.build

STEPS = 4


class Kinds(nn.Module):
    """Every kind of weight with channels: plain, grouped, depthwise, transposed, 1-D, matrices."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.plain = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.depth = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8)
        self.twice = nn.Conv2d(8, 16, 1, groups=8)
        self.up = nn.ConvTranspose2d(16, 6, 2, stride=2)
        self.line = nn.Conv1d(6, 8, 3, padding=1)
        self.right = nn.Parameter(torch.randn(8, 10) * 0.3)
        self.fc = nn.Linear(10, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.plain(x)))
        x = torch.relu(self.depth(self.grouped(x)))
        x = self.up(torch.relu(self.twice(x)))
        x = torch.relu(self.line(x.flatten(2))).mean(2)
        return self.fc(torch.tanh(x @ self.right))


KINDS = {
    "plain.weight": [0, 2],
    "norm.weight": 0.5,
    "grouped.weight": 0.5,
    "depth.weight": [0, 3, 4],
    "twice.weight": 0.25,
    "up.weight": [1, 2, 7, 11],
    "line.weight": "out:[0, 3, 4]",
    "right": 0.4,
    "fc.weight": "out:0.4",
    "fc.bias": [4],
}
OPTIMIZERS = {
    "sgd": (
        pocktvm.SGD(lr=0.05, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    ),
    "adam": (pocktvm.Adam(lr=1e-3), lambda p: torch.optim.Adam(p, lr=1e-3)),
    "adamw": (
        pocktvm.AdamW(lr=1e-3, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1),
    ),
}


def kinds():
    torch.manual_seed(1)
    return Kinds().eval(), (torch.randn(4, 3, 8, 8),), torch.tensor([0, 3, 1, 4])


def parts_of(module, inputs, scheme):
    model = import_model(module, inputs)
    return model, Scheme.parse(scheme).resolve(model)


def rows(part):
    return (slice(None),) * part.axis + (list(part.indices),)


def torch_slices(module, inputs, labels, updated, make_optimizer, steps=STEPS):
    """Full backprop whose updates outside the slices are undone."""
    module = copy.deepcopy(module).eval()
    names = dict(module.named_parameters())
    start = {n: p.detach().clone() for n, p in names.items()}
    for name, parameter in names.items():
        parameter.requires_grad_(name in updated)
    optimizer = make_optimizer([names[n] for n in updated])
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(module(*inputs), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        with torch.no_grad():
            for name, part in updated.items():
                if isinstance(part, Part):
                    trained = names[name][rows(part)].clone()
                    names[name].copy_(start[name])
                    names[name][rows(part)] = trained
    return losses, {n: p.detach().numpy() for n, p in names.items()}, start


def assert_slices_equal(state, theirs, start, updated, tolerance=2e-4):
    for name, before in start.items():
        part, ours, was = updated.get(name), state[name], before.numpy()
        moved = np.zeros(was.shape, bool)
        if part is not None:
            moved[rows(part) if isinstance(part, Part) else ...] = True
        assert np.array_equal(ours[~moved], was[~moved]), f"{name}: the frozen part changed"
        if part is None:
            continue
        assert not np.array_equal(ours[moved], was[moved]), f"{name} did not learn"
        scale = max(np.abs(theirs[name] - was).max(), 1e-6)
        gap = np.abs(ours - theirs[name]).max()
        assert gap <= tolerance * max(scale, np.abs(was).max()), f"{name}: {gap} of {scale}"


def interpret(graph, batch, lr, steps=STEPS):
    """Losses, and the tensors with torch's axes, of a graph in the reference interpreter."""
    params, losses = {n: p.value for n, p in graph.params.items()}, []
    for t in range(1, steps + 1):
        result = evaluate(graph, batch, params=params, lr=lr, t=t, keep=False)
        losses.append(float(result.outputs["loss"]))
        params |= result.updates
    back = {n: p.perm and np.argsort(p.perm) for n, p in graph.params.items()}
    return losses, {
        n: v if back[n] is None else v.transpose(back[n])
        for n, v in params.items()
    }  # fmt: skip


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


class Narrow(nn.Module):
    """Linear bottlenecks: what a weight's gradient keeps is its block's input and nothing else."""

    def __init__(self, blocks=6, width=32):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 1), nn.Identity()) for _ in range(blocks)
        )
        self.fc = nn.Linear(width, 4)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.fc(x.mean((2, 3)))


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


@pytest.mark.build
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


ZOO = {
    "mobilenetv2:width=0.35,image=32,classes=10": (
        {"blocks.1[3-5].pw1.0.weight": 0.25, "blocks.14.dw.0.weight": [3, 5, 99], "fc.weight": 0.3},
        "sgd",
    ),
    "bert:depth=2,dim=32,heads=2,hidden=64,vocab=60,positions=24,tokens=12": (
        {"blocks.*.weight": 0.25, "blocks.1.f2.weight": "out:[0, 7, 30]", "tok.weight": 0.5},
        "adam",
    ),
    "llama:depth=2,dim=32,heads=4,kv=2,hidden=48,vocab=60,tokens=12": (
        {"*.weight": "out:0.5"},
        "adam",
    ),
}


@pytest.mark.build
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


@pytest.mark.build
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
