"""Tuning with programs: over ssh (a real sshd on this machine), and counted under qemu-aarch64."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
from deploy_case import *  # noqa: F403 (fixtures)
from test_tuning import matmul_task

from pocktvm.errors import PockError
from pocktvm.schedule.compile_kernel import choose_rule
from pocktvm.schedule.rule import defaults
from pocktvm.targets import load_target
from pocktvm.tuning.candidate import Candidate, build_candidate
from pocktvm.tuning.runner_emulated import EmulatedRunner
from pocktvm.tuning.runner_ssh import SshRunner
from pocktvm.tuning.runners import CandidateError

pytestmark = [pytest.mark.build, pytest.mark.emulated]
NO_QEMU = "no qemu-aarch64: apt-get install qemu-user libc6-arm64-cross"


@pytest.fixture
def device(rig, monkeypatch):
    """The rig as a Raspberry Pi 4, found by this process's ssh."""
    if shutil.which("qemu-aarch64") is None:
        pytest.skip(NO_QEMU)
    rig.shim("uname", 'case $1 in -m) echo aarch64 ;; *) exec /bin/uname "$@" ;; esac')
    rig.prelude.write_text("export POCKTVM_LAUNCHER='qemu-aarch64 -L /usr/aarch64-linux-gnu'\n")
    for name, value in rig.env().items():
        monkeypatch.setenv(name, value)
    return rig


def candidate(folder, **knobs) -> Candidate:
    folder.mkdir()
    task = dataclasses.replace(matmul_task(), target=load_target("rpi4"))
    rule = choose_rule(task)
    return build_candidate(task, rule, {**defaults(rule.knobs(task)), **knobs}, folder)


def test_candidates_run_on_the_device_and_wrong_ones_are_caught(device, tmp_path):
    runner = SshRunner("device", load_target("rpi4"), threads=1)
    default, other = candidate(tmp_path / "a"), candidate(tmp_path / "b", mr=2)
    assert 0 < runner.time(default.folder) < 10
    assert 0 < runner.time(other.folder) < 10
    assert all(0 < s < 10 for s in runner.compare(default.folder, other.folder))
    runner._expected = [1.01 * a for a in runner._expected]
    with pytest.raises(CandidateError, match="wrong result"):
        runner.time(other.folder)
    device.prelude.write_text("export POCKTVM_LAUNCHER='false'\n")
    with pytest.raises(CandidateError, match="ended with 1"):
        runner.time(default.folder)
    assert not list(device.home.iterdir())


def test_a_device_of_another_architecture_is_refused(device):
    with pytest.raises(PockError, match="pocktvm tune MODEL --target rpi"):
        SshRunner("device", load_target("armv7"))


def test_counted_candidates_are_ranked_by_what_they_execute(tmp_path):
    if shutil.which("qemu-aarch64") is None:
        pytest.skip(NO_QEMU)
    runner = EmulatedRunner(load_target("rpi4"))
    default, narrow = candidate(tmp_path / "a"), candidate(tmp_path / "b", mr=1)
    fast, slow = runner.compare(default.folder, narrow.folder)
    assert runner.time(default.folder) == pytest.approx(fast, rel=0.01)  # counts do not jitter
    assert fast < 0.9 * slow  # a row at a time loads each weight again for every row
    runner._expected = [1.01 * a for a in runner._expected]
    with pytest.raises(CandidateError, match="wrong result"):
        runner.time(narrow.folder)
    runner.close()


@pytest.mark.parametrize("target", ["armv7", "m1", "host"])
def test_only_emulated_aarch64_can_be_counted(target):
    with pytest.raises(PockError, match="--runner ssh://host"):
        EmulatedRunner(load_target(target))
