"""Checkpoints: resuming equals never having stopped; nothing half-written is ever read."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time

import numpy as np
import pytest
import runtime_case as case
from runtime_fixtures import artifact, emulator, run
from safetensors.numpy import load_file, save_file
from waiting import PATIENCE, wait_until

from pocktvm.errors import PockError
from pocktvm.runtime.trainer import load


@pytest.fixture
def folder(tmp_path_factory):
    return artifact(tmp_path_factory, "host")


def trained(folder, path, steps=3):
    x, y = case.batch()
    with load(folder, threads=1) as trainer:
        for _ in range(steps):
            trainer.step(x, y)
        trainer.save(path)
        return trainer.state_dict()


def test_resuming_equals_never_having_stopped(folder, tmp_path):
    x, y = case.batch()
    with load(folder) as trainer:
        whole = [trainer.step(x, y) for _ in range(8)]
        end = trainer.state_dict()["fc.weight"].tobytes()
    trained(folder, tmp_path / "a", 5)
    with load(folder) as trainer:
        trainer.load(tmp_path / "a")
        assert trainer.steps == 5
        assert [trainer.step(x, y) for _ in range(3)] == whole[5:]
        assert trainer.state_dict()["fc.weight"].tobytes() == end


def test_a_run_resumes_from_another_target(folder, tmp_path, tmp_path_factory):
    whole = run(folder, "--steps", 6)["losses"]
    first = run(folder, "--steps", 4, "--save", tmp_path / "c")["losses"]
    rest = run(folder, "--steps", 6, "--resume", tmp_path / "c")
    assert first + rest["losses"] == whole and rest["steps"] == 6
    assert run(folder, "--steps", 4, "--resume", tmp_path / "c")["losses"] == []
    prefix = emulator("rpi4")
    other = artifact(tmp_path_factory, "rpi4")
    rest = run(other, "--steps", 6, "--resume", tmp_path / "c", prefix=prefix)["losses"]
    np.testing.assert_allclose(rest, whole[4:], rtol=1e-4)


def test_a_checkpoint_is_torchs_safetensors_and_deterministic(folder, tmp_path):
    state = trained(folder, tmp_path / "a")
    trained(folder, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    tensors = load_file(tmp_path / "a")
    assert list(tensors) == sorted(["exp_avg/fc.weight", "fc.weight", "head.weight"])
    for name in ("fc.weight", "head.weight"):
        np.testing.assert_array_equal(tensors[name], state[name])
    assert np.abs(tensors["exp_avg/fc.weight"]).max() > 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]  # no temporary, no lock


def _rewrite(path, change, metadata=None):
    """The file again, with its tensors changed."""
    tensors = load_file(path)
    change(tensors)
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    kept = {k: v for k, v in header["__metadata__"].items() if k != "crc32"}
    save_file(tensors, path, kept if metadata is None else metadata)


def _flip(path):
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


def _cut(nbytes):
    return lambda path: path.write_bytes(path.read_bytes()[:nbytes])


BAD = {
    "truncated": (_cut(-10), "is truncated: tensor 'head.weight'"),
    "header cut": (_cut(100), "truncated inside its header"),
    "empty": (_cut(0), "not a safetensors file"),
    "text": (lambda p: p.write_text("hello, I am no checkpoint at all"), "not a safetensors"),
    "damaged": (_flip, "is damaged: its checksum"),
    "missing": (lambda p: _rewrite(p, lambda t: t.pop("fc.weight")), "no tensor 'fc.weight'"),
    "no state": (
        lambda p: _rewrite(p, lambda t: t.pop("exp_avg/fc.weight")),
        r"no tensor 'exp_avg/fc.weight' \(optimizer state\)",
    ),
    "extra": (
        lambda p: _rewrite(p, lambda t: t.update(zeta=np.zeros(3, np.float32))),
        "its tensor 'zeta' is not trained here",
    ),
    "shape": (
        lambda p: _rewrite(p, lambda t: t.update({"head.weight": np.zeros((4, 32), np.float32)})),
        r"'head.weight' is F32\[4,32\], not F32\[5,32\]",
    ),
    "dtype": (
        lambda p: _rewrite(p, lambda t: t.update({"head.weight": np.zeros((5, 32), np.float16)})),
        r"'head.weight' is F16\[5,32\]",
    ),
    "foreign": (lambda p: _rewrite(p, lambda t: None, {}), "not a checkpoint of pocktvm"),
    "gone": (lambda p: p.unlink(), "No such file"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_checkpoint_is_refused_and_changes_nothing(folder, tmp_path, kind):
    path, (spoil, message) = tmp_path / "c", BAD[kind]
    trained(folder, path)
    spoil(path)
    x, y = case.batch()
    with load(folder) as trainer:
        trainer.step(x, y)
        before = {n: a.tobytes() for n, a in trainer.state_dict().items()}
        with pytest.raises(PockError, match=message):
            trainer.load(path)
        assert {n: a.tobytes() for n, a in trainer.state_dict().items()} == before
        assert trainer.steps == 1
    done = run(folder, "--resume", path, check=False)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1


def test_a_checkpoint_on_other_frozen_weights_is_refused(folder, tmp_path):
    trained(folder, tmp_path / "c")
    other = case.build("host", tmp_path / "other", state=case.parameters(seed=9))
    with load(other) as trainer, pytest.raises(PockError, match="other frozen weights"):
        trainer.load(tmp_path / "c")


def test_every_header_byte_may_be_wrong(folder, tmp_path):
    """Whatever a byte of the header becomes, the file is refused or read; nothing crashes."""
    path = tmp_path / "c"
    trained(folder, path)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    with load(folder) as trainer:
        for at in range(0, 8 + int.from_bytes(whole[:8], "little"), 3):
            data = bytearray(whole)
            data[at] = int(rng.integers(0, 256))
            path.write_bytes(data)
            try:
                trainer.load(path)
            except PockError as error:
                assert str(path) in str(error)


def test_a_full_disk_keeps_the_previous_checkpoint(folder, tmp_path):
    path = tmp_path / "c"
    run(folder, "--steps", 2, "--save", path)
    before = path.read_bytes()
    command = (
        f"ulimit -f 1; exec {folder}/pocktvm-run {folder} --steps 4 --resume {path} --save {path}"
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    if len(before) <= 1024:
        pytest.fail("the checkpoint fits the limit")
    assert done.returncode == 1
    assert "cannot write checkpoint" in done.stderr and "untouched" in done.stderr
    assert path.read_bytes() == before and sorted(os.listdir(tmp_path)) == ["c"]


def test_a_missing_folder_is_refused_before_the_first_step(folder, tmp_path):
    done = run(folder, "--steps", 100, "--save", tmp_path / "no" / "c", "--progress", check=False)
    assert done.returncode == 1 and "progress" not in done.stderr


def _start(folder, *options):
    command = [folder / "pocktvm-run", folder, "--progress", *options]
    child = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)
    assert child.stderr is not None
    child.stderr.readline()  # it trains
    return child


def test_a_checkpoint_in_use_is_locked(folder, tmp_path):
    path = tmp_path / "c"
    child = _start(folder, "--steps", 10**9, "--save", path)
    try:
        done = run(folder, "--steps", 1, "--save", path, check=False)
        assert done.returncode == 1
        assert f"in use by another trainer (process {child.pid})" in done.stderr
        with load(folder) as trainer, pytest.raises(PockError, match="in use"):
            trainer.save(path)
    finally:
        child.kill()
        child.communicate()
    run(folder, "--steps", 1, "--save", path)  # a killed trainer leaves no lock behind
    assert sorted(os.listdir(tmp_path)) == ["c"]


def test_killed_at_any_moment_it_resumes_where_the_checkpoint_is(folder, tmp_path):
    path = tmp_path / "c"
    whole = run(folder, "--steps", 100)["losses"]
    for _ in range(5):
        child = _start(folder, "--steps", 10**9, "--save", path, "--save-every", "1ms")
        wait_until(path.exists, child, every=0.001)
        child.kill()
        child.communicate()
        done = run(folder, "--steps", 0, "--resume", path)
        assert done["steps"] > 0
        path.unlink()
    run(folder, "--steps", 40, "--save", path, "--save-every", "7")
    assert run(folder, "--steps", 100, "--resume", path)["losses"] == whole[40:]


def test_a_hundred_kills_later_the_weights_are_the_unbroken_runs(folder, tmp_path):
    """SIGKILL at random moments, start-up and the writing of checkpoints among them."""
    chance, broken, whole = random.Random(0), tmp_path / "broken", tmp_path / "whole"
    kills = found = 0
    while kills < 100 or found <= 100:  # as many as it takes: how far one gets is the machine's
        resume = ("--resume", broken) if broken.exists() else ()
        options = ("--steps", 10**9, "--save", broken, "--save-every", "2ms", *resume)
        child = subprocess.Popen([folder / "pocktvm-run", folder, *map(str, options)])
        time.sleep(chance.uniform(0, 0.06))
        assert child.poll() is None
        child.kill()
        child.communicate()
        kills += 1
        if broken.exists():
            reached = run(folder, "--steps", 0, "--resume", broken)["steps"]
            assert reached >= found
            found = reached
    total = found + 1000
    run(folder, "--steps", total, "--resume", broken, "--save", broken)
    run(folder, "--steps", total, "--save", whole)
    assert broken.read_bytes() == whole.read_bytes()


def test_it_ends_cleanly_when_asked_to(folder, tmp_path):
    path = tmp_path / "c"
    child = _start(folder, "--steps", 10**9, "--save", path)
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=PATIENCE)
    assert child.returncode == 128 + signal.SIGTERM
    assert run(folder, "--steps", 0, "--resume", path)["steps"] > 0


def test_it_dies_with_its_parent(folder):
    script = (
        f"{folder}/pocktvm-run {folder} --steps 1000000000 --die-with-parent & echo $!; sleep 0.5"
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=PATIENCE)
    pid = int(done.stdout.split()[0])
    wait_until(lambda: not _alive(pid))


def _alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().split()[2] != "Z"
    except OSError:
        return False
