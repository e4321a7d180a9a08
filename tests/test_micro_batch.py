"""The batch in parts: the whole batch's loss and gradients, whatever labels a part holds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from equality import assert_losses_equal, assert_updates_equal
from torch import nn
from torch.nn import functional as F

import pocktvm
from pocktvm import levers
from pocktvm.autodiff.differentiate import differentiate
from pocktvm.autodiff.losses import parse_loss
from pocktvm.autodiff.optimizers import parse_optimizer
from pocktvm.build import Build
from pocktvm.fit import in_parts
from pocktvm.frontend.torch import import_torch
from pocktvm.ir.scheme import Scheme
from pocktvm.passes import run_passes
from pocktvm.recorded import record_self_test
from pocktvm.reference import evaluate
from pocktvm.targets import load_target

BATCH = 8


class Net(nn.Module):
    def __init__(self, mixes: bool = False):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6 * 16, 5)
        self.drop, self.mixes = nn.Dropout(0.3), mixes

    def forward(self, x):
        x = torch.relu(self.conv(x)).flatten(1)
        x = x - x.mean(0) if self.mixes else x
        return self.fc(self.drop(x))


@pytest.fixture(scope="module")
def batch():
    torch.manual_seed(0)
    x = torch.randn(BATCH, 3, 4, 4)
    # one part of two has no label that counts, the others have one or two
    y = torch.tensor([1, -100, -100, -100, 2, 0, 4, -100])
    return x, y


def steps(loss: str, x, optimizer="sgd", dropout=False):
    """(the whole step, the step in parts by number)."""
    torch.manual_seed(1)
    module = Net()
    rule = parse_optimizer(optimizer)

    def step(inputs, count):
        model = import_torch(module, (inputs,), dropout=dropout)
        updated = dict.fromkeys(model.parameters, 1.0)
        return differentiate(model, updated, parse_loss(loss), rule, None, count)[0]

    return module, step(x, 1), {n: step(x[: BATCH // n], n) for n in (2, 4)}


LOSSES = ["cross_entropy", "cross_entropy:label_smoothing=0.2,weight=[1,2,0.5,3,1]", "mse",
          "bce_with_logits", "kl_div:reduction=sum", "kl_div:reduction=batchmean"]  # fmt: skip


@pytest.mark.parametrize("loss", LOSSES)
def test_parts_add_up_to_the_whole_step(loss, batch):
    x, y = batch
    labels = y if loss.startswith("cross") else torch.rand(BATCH, 5)
    _, whole, parts = steps(loss, x, "adam" if loss == "mse" else "sgd")
    arrays = {"x": x.numpy(), "y": labels.numpy().astype(np.int32 if loss[0] == "c" else "float32")}
    want = evaluate(whole, arrays, lr=0.1)
    for count, step in parts.items():
        for graph in (step, run_passes(step)) if count == 4 else (step,):
            got = evaluate(graph, arrays, lr=0.1)
            assert got.outputs["loss"] == pytest.approx(want.outputs["loss"], rel=1e-5)
            for name, array in want.updates.items():
                new = graph.params[name].in_torch(got.updates[name])
                np.testing.assert_allclose(new, array, rtol=2e-4, atol=2e-6, err_msg=name)


def test_cross_entropy_is_torchs(batch):
    """Against torch itself, where whole parts are ignored."""
    x, y = batch
    loss = "cross_entropy:weight=[1,2,0.5,3,1]"
    module, _, parts = steps(loss, x)
    module.eval()
    weight = torch.tensor([1, 2, 0.5, 3, 1])
    theirs = F.cross_entropy(module(x), y, weight=weight)
    theirs.backward()
    arrays = {"x": x.numpy(), "y": y.numpy().astype(np.int32)}
    got = evaluate(parts[4], arrays, lr=1.0)
    assert got.outputs["loss"] == pytest.approx(theirs.item(), rel=1e-5)
    for name, p in module.named_parameters():
        np.testing.assert_allclose(got.updates[name], (p - p.grad).detach(), rtol=1e-4, atol=1e-6)


def test_masks_are_those_of_the_whole_batch(batch):
    x, y = batch
    _, whole, parts = steps("cross_entropy", x, dropout=True)
    arrays = {"x": x.numpy(), "y": y.numpy().astype(np.int32)}
    losses = [evaluate(g, arrays, seed=3).outputs["loss"] for g in (whole, parts[2], parts[4])]
    np.testing.assert_allclose(losses, losses[0], rtol=1e-5)


def build_of(module, x):
    loss, rule = parse_loss("cross_entropy"), parse_optimizer("sgd")
    return Build(module, (x,), Scheme.parse("full"), loss, rule, load_target("host"))


@pytest.mark.parametrize("mixes", [False, True])
def test_samples_that_meet_are_not_parted(batch, mixes):
    x, _ = batch
    build = build_of(Net(mixes), x)
    model = import_torch(build.module, (x,))
    graphs = differentiate(model, dict.fromkeys(model.parameters, 1.0), build.loss, build.optimizer)
    from pocktvm.identity import label_inputs

    test = record_self_test(graphs, label_inputs(model, build.loss), build.optimizer)
    assert (in_parts(build, 2, test) is None) == mixes
    assert in_parts(build, 3, test) is None


class Wide(nn.Module):
    """Activations far larger than weights, and nothing cheap to make again: an input per layer."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1) for i in range(4))
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        for conv in self.convs:
            x = torch.tanh(conv(x))
        return self.fc(x.mean((2, 3)))


@pytest.mark.build
def test_a_build_in_parts_trains_as_torch(batch, monkeypatch):
    """Ten of torch's steps, with labels to ignore; the plan is within the budget."""
    torch.manual_seed(2)
    module, x, y = Wide(), torch.randn(BATCH, 3, 48, 48), batch[1]
    monkeypatch.setattr(levers, "TOLERABLE", 0.0)  # look at parts whatever recomputation costs
    options = dict(optimizer=pocktvm.SGD(lr=0.05))
    plain = pocktvm.compile(module, x, **options).plan
    limit = plain.total_bytes - 2 * (plain.arena_bytes - plain.persistent_bytes) // 5
    artifact = pocktvm.compile(module, x, budget=limit, **options)
    assert artifact.trade.parts > 1 and artifact.plan.total_bytes <= limit
    start = {n: t.clone() for n, t in module.state_dict().items()}
    with artifact.load() as trainer:
        ours = [trainer.step(x.numpy(), y.numpy()) for _ in range(10)]
        state = trainer.state_dict()
    optimizer, theirs = torch.optim.SGD(module.parameters(), lr=0.05), []
    for _ in range(10):
        optimizer.zero_grad()
        loss = F.cross_entropy(module(x), y)
        loss.backward()
        optimizer.step()
        theirs.append(loss.item())
    assert_losses_equal(ours, theirs)
    assert_updates_equal(state, module.state_dict(), start, artifact.updated)
