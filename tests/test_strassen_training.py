"""Training through Strassen's products, forward and both gradients, beside torch and emulated."""

from __future__ import annotations

import shutil

import pytest
import torch
from equality import Work, assert_losses_equal, assert_updates_equal, our_run, torch_run
from test_schedule_strassen import default_form

import pocktvm
from pocktvm.targets import load_target

pytestmark = pytest.mark.build
SIZE = 512  # of every axis: the least that every target's form begins at
LR = 0.1


@pytest.fixture(scope="module")
def work():
    return Work.of(f"mlp:inputs={SIZE},hidden={SIZE},depth=3,classes={SIZE}", SIZE)


def built(work, scheme, target="host"):
    assert default_form(SIZE, SIZE, SIZE, load_target(target)) == "strassen"
    return pocktvm.compile(
        work.source.module, work.source.example_inputs, target=target, scheme=scheme,
        published=work.source.scheme,
    )  # fmt: skip


@pytest.mark.parametrize("scheme", ["full", "last", "bias:2"])
def test_ten_steps_are_torchs(work, scheme):
    artifact = built(work, scheme)
    start = {name: t.clone() for name, t in work.source.module.state_dict().items()}
    ours, weights = our_run(artifact, work, LR)
    theirs, expected = torch_run(
        work, artifact.updated, lambda parameters: torch.optim.SGD(parameters, lr=LR)
    )
    assert_losses_equal(ours, theirs)
    assert theirs[-1] < theirs[0]
    assert_updates_equal(weights, expected, start, artifact.updated)


@pytest.mark.emulated
def test_a_raspberry_pi_4_gives_the_hosts_losses(work):
    if shutil.which("qemu-aarch64") is None:
        pytest.skip("no qemu-aarch64: apt-get install qemu-user libc6-arm64-cross")
    losses = [our_run(built(work, "full", t), work, LR, steps=2)[0] for t in ("rpi4", "host")]
    assert_losses_equal(*losses)
