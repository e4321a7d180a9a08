"""Ten steps of every zoo model, under every scheme, are torch's ten steps."""

from __future__ import annotations

import pytest
import torch

import pocktvm
from tests.equality import (
    REDUCED,
    SCHEMES,
    Work,
    assert_losses_equal,
    assert_updates_equal,
    our_run,
    torch_run,
)

FAST = {"mlp", "cnn", "mobilenetv2", "bert", "llama"}
LR = 0.01


def check(model: str, scheme: str, optimizer, make_optimizer, lr, exempt=lambda name: False):
    work = Work.of(*REDUCED[model])
    artifact = pocktvm.compile(
        work.source.module,
        work.source.example_inputs,
        scheme=scheme,
        optimizer=optimizer,
        published=work.source.scheme,
    )
    start = {n: t.clone() for n, t in work.source.module.state_dict().items()}
    tied = work.source.module.state_dict()
    losses, state = our_run(artifact, work, lr)
    theirs, their_state = torch_run(work, artifact.updated, make_optimizer)
    assert_losses_equal(losses, theirs)
    assert_updates_equal(state, their_state, tied, artifact.updated, exempt)
    for name, before in start.items():
        assert torch.equal(before, tied[name]), f"compile changed the user's module: {name}"
    missing = set(dict(work.source.module.named_parameters(remove_duplicate=False))) - set(state)
    assert not missing, f"state_dict lacks {missing}"


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "model", [m if m in FAST else pytest.param(m, marks=pytest.mark.slow) for m in REDUCED]
)
def test_sgd_is_torchs(model, scheme):
    check(model, scheme, pocktvm.SGD(lr=LR), lambda p: torch.optim.SGD(p, lr=LR), LR)


@pytest.mark.parametrize("model", ["mlp", "mobilenetv2", "bert"])
def test_adamw_is_torchs(model):
    def exempt(name: str) -> bool:
        # The true gradient of an attention key's bias is zero: softmax does not see it.
        return name.endswith((".k.bias", ".key.bias"))

    check(
        model, "full", pocktvm.AdamW(lr=1e-3),
        lambda p: torch.optim.AdamW(p, lr=1e-3), 1e-3, exempt,
    )  # fmt: skip
