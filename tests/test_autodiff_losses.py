"""Losses and optimizers against torch's, and what options do."""

import numpy as np
import pytest
import torch
from gradients import build, check, count, feed
from torch import nn
from torch.nn import functional as F

from pocktvm.autodiff.losses import parse_loss
from pocktvm.autodiff.optimizers import SGD, Adam, AdamW, Lion, parse_optimizer
from pocktvm.errors import PockError
from pocktvm.reference import evaluate

WEIGHT = [0.5, 2.0, 1.0, 0.1, 3.0]


def ones_cosine(output, y):
    return F.cosine_embedding_loss(output, y, torch.ones(len(output)))


def classes(*shape):
    y = torch.randint(0, 5, shape)
    y.view(-1)[0] = -100
    return y


LOSSES = {
    "cross_entropy": (F.cross_entropy, lambda: torch.randint(0, 5, (4,))),
    "cross_entropy:label_smoothing=0.1": (
        lambda o, y: F.cross_entropy(o, y, label_smoothing=0.1),
        lambda: classes(4),
    ),
    "cross_entropy:ignore_index=3": (
        lambda o, y: F.cross_entropy(o, y, ignore_index=3),
        lambda: torch.tensor([3, 1, 3, 2]),
    ),
    "cross_entropy:weight=[0.5,2,1,0.1,3],label_smoothing=0.2": (
        lambda o, y: F.cross_entropy(o, y, torch.tensor(WEIGHT), label_smoothing=0.2),
        lambda: classes(4),
    ),
    "bce_with_logits": (F.binary_cross_entropy_with_logits, lambda: torch.rand(4, 5)),
    "bce_with_logits:pos_weight=2.5": (
        lambda o, y: F.binary_cross_entropy_with_logits(o, y, pos_weight=torch.tensor(2.5)),
        lambda: torch.rand(4, 5),
    ),
    "mse": (F.mse_loss, lambda: torch.randn(4, 5)),
    "l1": (F.l1_loss, lambda: torch.randn(4, 5)),
    "huber": (F.huber_loss, lambda: 3 * torch.randn(4, 5)),
    "huber:delta=0.4": (lambda o, y: F.huber_loss(o, y, delta=0.4), lambda: torch.randn(4, 5)),
    "kl_div": (F.kl_div, lambda: torch.softmax(torch.randn(4, 5), 1) * (torch.rand(4, 5) > 0.3)),
    "kl_div:reduction=batchmean": (
        lambda o, y: F.kl_div(o, y, reduction="batchmean"),
        lambda: torch.softmax(torch.randn(4, 5), 1),
    ),
    "kl_div:log_target=true": (
        lambda o, y: F.kl_div(o, y, log_target=True),
        lambda: torch.log_softmax(torch.randn(4, 5), 1),
    ),
    "cosine_embedding": (ones_cosine, lambda: torch.randn(4, 5)),
}


@pytest.mark.parametrize("spec", LOSSES)
def test_loss(spec):
    torch.manual_seed(0)
    torch_loss, make_y = LOSSES[spec]
    module = nn.Sequential(nn.Linear(6, 5), nn.LogSoftmax(1) if "kl" in spec else nn.Identity())
    check(module, torch.randn(4, 6), spec, torch_loss, make_y())


def test_cross_entropy_reads_the_class_axis_1_at_any_rank():
    torch.manual_seed(0)
    module = nn.Conv2d(3, 5, 1)
    check(module, torch.randn(2, 3, 4, 3), "cross_entropy", F.cross_entropy, classes(2, 4, 3))


def test_language_models_logits_are_not_permuted():
    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(6, 5)

        def forward(self, x):
            return self.head(x).transpose(1, 2)

    torch.manual_seed(0)
    step = check(Decoder(), torch.randn(2, 3, 6), "cross_entropy", F.cross_entropy, classes(2, 3))
    assert count(step, "permute_dims") == 0


def test_loss_none_takes_no_labels():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 5)

        def forward(self, x, target):
            return F.cross_entropy(self.fc(x), target)

    torch.manual_seed(0)
    inputs = (torch.randn(4, 6), torch.tensor([1, 0, 4, 2]))
    step = check(Own(), inputs, "none")
    assert step.inputs == ("x", "target")


def test_labels_follow_from_the_output():
    loss = parse_loss("cross_entropy:ignore_index=-1")
    y = loss.label_input((8, 10, 4))
    assert (y.name, y.shape, y.dtype, y.bound, y.ignore_index) == ("y", (8, 4), "int32", 10, -1)
    assert parse_loss("mse").label_input((8, 3)).dtype == "float32"
    assert parse_loss("none").label_input(()) is None
    with pytest.raises(PockError, match="returns the loss itself"):
        parse_loss("none").label_input((8, 3))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cross_entropi", "did you mean 'cross_entropy'"),
        ("mse:delta=1", "no option 'delta'"),
        ("huber:delta=x", "wants a number"),
        ("huber:delta=-1", "must be positive"),
        ("cross_entropy:label_smoothing=1.5", "must lie in"),
    ],
)
def test_bad_losses_are_refused(spec, message):
    with pytest.raises(PockError, match=message):
        parse_loss(spec)


def test_a_loss_of_torchs_is_refused_by_name():
    with pytest.raises(PockError, match="MSELoss is no loss of pocktvm's"):
        parse_loss(torch.nn.MSELoss())


def test_a_loss_prints_as_it_is_parsed():
    for spec in LOSSES:
        assert parse_loss(str(parse_loss(spec))) == parse_loss(spec)


def lion(params, lr, betas, weight_decay):
    """Chen et al. 2023, algorithm 2, as torch has none."""
    state = {p: torch.zeros_like(p) for p in params}

    def step():
        with torch.no_grad():
            for p, m in state.items():
                update = (betas[0] * m + (1 - betas[0]) * p.grad).sign()
                p.mul_(1 - lr * weight_decay).sub_(lr * update)
                m.mul_(betas[1]).add_((1 - betas[1]) * p.grad)

    return step


LR = 0.05
OPTIMIZERS = {
    "sgd": lambda ps: torch.optim.SGD(ps, LR).step,
    "sgd:weight_decay=0.1": lambda ps: torch.optim.SGD(ps, LR, weight_decay=0.1).step,
    "momentum": lambda ps: torch.optim.SGD(ps, LR, 0.9).step,
    "sgd:momentum=0.8,weight_decay=1e-2": lambda ps: (
        torch.optim.SGD(ps, LR, 0.8, weight_decay=1e-2).step
    ),
    "nesterov": lambda ps: torch.optim.SGD(ps, LR, 0.9, nesterov=True).step,
    "adam": lambda ps: torch.optim.Adam(ps, LR).step,
    "adam:betas=[0.8,0.99],weight_decay=0.1": lambda ps: (
        torch.optim.Adam(ps, LR, (0.8, 0.99), weight_decay=0.1).step
    ),
    "adamw": lambda ps: torch.optim.AdamW(ps, LR).step,
    "adamw:eps=1e-3,weight_decay=0.3": lambda ps: (
        torch.optim.AdamW(ps, LR, eps=1e-3, weight_decay=0.3).step
    ),
    "lion:weight_decay=0.1": lambda ps: lion(ps, LR, (0.9, 0.99), 0.1),
}


def train(module, x, y, spec, steps=5):
    """Parameters after some steps, by the reference of our program."""
    model, step, _ = build(module, x, "cross_entropy", optimizer=parse_optimizer(spec))
    params = {}
    for t in range(1, steps + 1):
        params |= evaluate(step, feed(model, (x,), y), params=params, lr=LR, t=t).updates
    return step, params


def torch_train(module, x, y, make, steps=5, clip=None):
    params = [*module.parameters()]
    step = make(params)
    for _ in range(steps):
        module.zero_grad()
        F.cross_entropy(module(x), y).backward()
        if clip:
            clip(params)
        step()
    return {n: p.detach().numpy() for n, p in module.named_parameters()}


def problem():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
    return module, torch.randn(4, 6), torch.randint(0, 5, (4,))


@pytest.mark.parametrize("spec", OPTIMIZERS)
def test_five_steps_of_an_optimizer(spec):
    module, x, y = problem()
    _, params = train(module, x, y, spec)
    for name, expected in torch_train(module, x, y, OPTIMIZERS[spec]).items():
        np.testing.assert_allclose(params[name], expected, rtol=0, atol=2e-6, err_msg=name)


def test_clipping_by_global_norm():
    module, x, y = problem()
    _, params = train(module, x, y, "sgd:clip_norm=0.1")
    expected = torch_train(
        module, x, y, OPTIMIZERS["sgd"], clip=lambda ps: nn.utils.clip_grad_norm_(ps, 0.1)
    )
    for name, value in expected.items():
        np.testing.assert_allclose(params[name], value, rtol=0, atol=2e-6, err_msg=name)


def test_clipping_by_tensor():
    def clip(params):
        for p in params:
            nn.utils.clip_grad_norm_([p], 0.05)

    module, x, y = problem()
    _, params = train(module, x, y, "sgd:clip_tensor=0.05")
    for name, value in torch_train(module, x, y, OPTIMIZERS["sgd"], clip=clip).items():
        np.testing.assert_allclose(params[name], value, rtol=0, atol=2e-6, err_msg=name)


def test_states_and_scalars_of_a_program():
    module, x, _ = problem()
    _, step, predict = build(module, x, "cross_entropy", ["2.weight"], AdamW())
    states = {n: p.kind for n, p in step.params.items()}
    assert states == {
        "2.weight": "trained",
        "exp_avg/2.weight": "optimizer",
        "exp_avg_sq/2.weight": "optimizer",
    }
    assert set(step.scalars.values()) == {"lr", "bias_correction:0.9", "bias_correction:0.999"}
    assert set(step.updates) == set(step.params)
    assert [*predict.params] == ["2.weight"]
    assert "0.weight" in step.consts
    assert count(step, "sqrt") == 2


def test_optimizers_print_as_they_are_parsed():
    assert repr(parse_optimizer("nesterov")) == repr(SGD(momentum=0.9, nesterov=True))
    assert repr(parse_optimizer("adam:lr=0.1,beta2=0.9")) == repr(Adam(0.1, (0.9, 0.9)))
    assert parse_optimizer("lion", lr=0.5).lr == 0.5
    for optimizer in (SGD(), Adam(weight_decay=0.1), AdamW(clip_norm=1.0), Lion(betas=(0.5, 0.6))):
        assert repr(parse_optimizer(str(optimizer))) == repr(optimizer)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("sdg", "did you mean 'sgd'"),
        ("sgd:momentum=1.5", "in \\[0, 1\\)"),
        ("sgd:beta1=0.1", "no option 'beta1'"),
        ("sgd:nesterov=true", "needs a momentum"),
        ("adam:eps=0", "must be positive"),
    ],
)
def test_bad_optimizers_are_refused(spec, message):
    with pytest.raises(PockError, match=message):
        parse_optimizer(spec)
