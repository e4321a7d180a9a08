"""Dropout: seeded masks that every target makes alike, torch's training under the same masks."""

from __future__ import annotations

import copy
import shutil

import numpy as np
import pytest
import torch
from equality import assert_losses_equal
from torch import nn
from torch.nn import functional as F

import pocktvm
from pocktvm.errors import PockError
from pocktvm.frontend.torch import import_torch
from pocktvm.reference.dropout import dropout_mask, step_seed

pytestmark = pytest.mark.build

SEED, LR = 7, 0.05


class Net(nn.Module):
    """A convolution that loses whole channels, rows that lose elements, one dropout of p = 0."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.channels = nn.Dropout2d(0.4)
        self.pixels = nn.Dropout(0.2)
        self.never = nn.Dropout(0.0)
        self.fc = nn.Linear(8 * 16, 24)
        self.rows = nn.Dropout(0.5)
        self.out = nn.Linear(24, 4)

    def forward(self, x):
        x = self.pixels(self.channels(torch.relu(self.conv(x)))).flatten(1)
        return self.out(self.rows(torch.relu(self.fc(self.never(x)))))


class Given(nn.Module):
    """Dropout number `key` with our masks; `step` holds the step's seed."""

    def __init__(self, p: float, key: int, step: dict[str, int], channels: bool = False):
        super().__init__()
        self.p, self.key, self.seed_of, self.channels = p, key, step, channels

    def forward(self, x):
        shape = (*x.shape[:2], 1, 1) if self.channels else x.shape
        mask = dropout_mask(shape, self.p, self.key, self.seed_of["seed"])
        return x * torch.from_numpy(mask) / (1 - self.p)


@pytest.fixture(scope="module")
def work():
    torch.manual_seed(0)
    module = Net().eval()
    x, y = torch.randn(4, 3, 4, 4), torch.tensor([0, 3, 1, 2])
    return module, x, y


@pytest.fixture(scope="module")
def artifact(work):
    return pocktvm.compile(work[0], work[1], dropout=True, optimizer=pocktvm.SGD(lr=LR))


def torch_losses(module, x, y, steps=6):
    """Torch's steps when it is fed the same masks."""
    step: dict[str, int] = {}
    module = copy.deepcopy(module)
    module.channels = Given(0.4, 0, step, channels=True)
    module.pixels, module.rows = Given(0.2, 1, step), Given(0.5, 2, step)
    optimizer, losses = torch.optim.SGD(module.parameters(), lr=LR), []
    for t in range(1, steps + 1):
        step["seed"] = step_seed(SEED, t)
        optimizer.zero_grad()
        loss = F.cross_entropy(module(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, module.state_dict()


def test_masks_are_fair_coins():
    """A share p is dropped, whatever the key, the step and the position; no two masks agree."""
    kept = np.stack([dropout_mask((500, 40), 0.3, k, step_seed(1, t)).ravel()
                     for k in range(6) for t in range(1, 9)]).astype(float)  # fmt: skip
    n = kept.shape[1]
    assert abs(kept.mean() - 0.7) < 4 * (0.21 / kept.size) ** 0.5
    assert np.all(np.abs(kept.mean(axis=1) - 0.7) < 5 * (0.21 / n) ** 0.5)
    together = np.corrcoef(kept)[np.triu_indices(len(kept), 1)]
    assert np.abs(together).max() < 5.5 / n**0.5
    for lag in (1, 2, 40, 64):  # neighbours in memory
        r = [np.corrcoef(row[:-lag], row[lag:])[0, 1] for row in kept]
        assert np.abs(r).max() < 5.5 / n**0.5
    assert dropout_mask((1000,), 0.0, 3, 5).all()


def test_training_is_torchs_under_the_same_masks(work, artifact):
    module, x, y = work
    theirs, state = torch_losses(module, x, y)
    with artifact.load(seed=SEED) as trainer:
        ours = [trainer.step(x.numpy(), y.numpy()) for _ in theirs]
        got = trainer.state_dict()
        np.testing.assert_allclose(  # predict never drops
            trainer.predict(x.numpy()), _forward(module, state, x), rtol=1e-4, atol=1e-5
        )
    assert_losses_equal(ours, theirs)
    for name, tensor in state.items():
        np.testing.assert_allclose(got[name], tensor.numpy(), rtol=1e-3, atol=1e-6)
    with artifact.load(seed=SEED + 1) as trainer:
        assert trainer.step(x.numpy(), y.numpy()) != ours[0]


def _forward(module, state, x):
    module = copy.deepcopy(module).eval()
    module.load_state_dict(state)
    return module(x).detach().numpy()


def test_resuming_is_never_having_stopped(work, artifact, tmp_path):
    """Bit for bit: the checkpoint knows the seed and the step."""
    x, y = work[1].numpy(), work[2].numpy()
    with artifact.load(seed=SEED) as trainer:
        whole = [trainer.step(x, y) for _ in range(6)]
    with artifact.load(seed=SEED) as trainer:
        first = [trainer.step(x, y) for _ in range(3)]
        trainer.save(tmp_path / "c.safetensors")
    with artifact.load() as trainer:
        trainer.load(tmp_path / "c.safetensors")
        assert first + [trainer.step(x, y) for _ in range(3)] == whole


@pytest.mark.emulated
def test_another_target_drops_the_same(work, artifact):
    if shutil.which("qemu-aarch64") is None:
        pytest.skip("no qemu-aarch64: apt-get install qemu-user libc6-arm64-cross")
    x, y = work[1].numpy(), work[2].numpy()
    other = pocktvm.compile(
        work[0], work[1], dropout=True, optimizer=pocktvm.SGD(lr=LR), target="rpi4"
    )
    losses = []
    for one in (artifact, other):
        with one.load(seed=SEED) as trainer:
            losses.append([trainer.step(x, y) for _ in range(4)])
    assert_losses_equal(losses[1], losses[0])


class Attends(nn.Module):
    """Dropout inside attention, and one that asks its module."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        p = 0.3 if self.training else 0.0
        a = F.scaled_dot_product_attention(q, k, v, dropout_p=p).transpose(1, 2).flatten(2)
        return self.out(F.dropout(a, 0.25, self.training).mean(1))


def test_dropout_inside_attention(tmp_path):
    """The self-test holds the kernels against the reference, masks included."""
    import subprocess

    torch.manual_seed(1)
    x = torch.randn(2, 6, 8)
    artifact = pocktvm.compile(Attends().eval(), x, dropout=True)
    keys = {n.attrs["key"] for n in dropouts(Attends().eval(), x, True)}
    assert keys == {0, 1}
    command = [artifact.path / "pocktvm-run", artifact.path, "--selftest"]
    assert subprocess.run(command, check=False).returncode == 0


def dropouts(module, x, dropout):
    """The dropout nodes of the step, forward and backward."""
    from pocktvm.autodiff.differentiate import differentiate
    from pocktvm.autodiff.losses import parse_loss
    from pocktvm.autodiff.optimizers import parse_optimizer

    model = import_torch(module, (x,), dropout=dropout)
    updated = dict.fromkeys(model.parameters, 1.0)
    step, predict = differentiate(
        model, updated, parse_loss("cross_entropy"), parse_optimizer("sgd")
    )
    assert not [n for n in predict.nodes if n.op == "dropout"]
    return [n for n in step.nodes if n.op == "dropout"]


def test_without_the_flag_dropout_is_the_identity_and_says_so(work):
    module, x, _ = work
    assert dropouts(copy.deepcopy(module).train(), x, False) == []
    assert any("--dropout keeps it" in n for n in import_torch(module, (x,)).notices)
    assert len(dropouts(module, x, True)) == 5  # channels: no gradient of its own constant
    plain = nn.Sequential(nn.Linear(3, 2))
    notices = import_torch(plain, (torch.zeros(1, 3),), dropout=True).notices
    assert any("no dropout" in n for n in notices)


def test_onnx_files_are_refused():
    with pytest.raises(PockError, match="ONNX"):
        pocktvm.compile("somewhere.onnx", None, dropout=True)
