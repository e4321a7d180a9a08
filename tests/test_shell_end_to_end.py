"""The product as a user meets it: build, run, stop, resume, evaluate, through the command line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from waiting import PATIENCE, wait_until

from pocktvm.cli.targets import lacks
from pocktvm.manifest import read_manifest
from pocktvm.targets import list_targets

pytestmark = pytest.mark.build
ROOT = Path(__file__).parent.parent
BATCH, SAMPLES = 8, 19


def cli(*words: object, code: int = 0, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pocktvm", *(str(w) for w in words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=900, env=environment, **options
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr or code == 3
    return done


def facts(*words: object) -> dict:
    return json.loads(cli(*words, "--json").stdout)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("shell")


@pytest.fixture(scope="module")
def artifact(place) -> Path:
    words = ("build", "mlp", "--scheme", "full", "--batch", BATCH, "-o", place / "mlp")
    built = facts(*words, "--optimizer", "adam")
    assert built["up_to_date"] is False
    return place / "mlp"


@pytest.fixture(scope="module")
def data(place) -> Path:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((SAMPLES, 64)).astype(np.float32)
    np.savez(place / "data.npz", x=x, y=rng.integers(0, 10, SAMPLES))
    return place / "data.npz"


def test_build_reports_the_contract(artifact):
    shown = facts("inspect", artifact)
    keys = "target model scheme batch updated plan kernels seconds".split()
    assert set(keys) <= shown.keys() and shown["target"] == "host" and shown["batch"] == BATCH
    assert set(shown["kernels"]) == {"tuned", "rule", "fallback", "untuned"}
    plan = shown["plan"]
    assert plan["lower_bound_bytes"] <= plan["arena_bytes"] <= plan["total_bytes"]
    assert set(shown["updated"].values()) == {1.0} and "fc.weight" in shown["updated"]
    assert isinstance(shown["seconds"], float)


def test_a_second_build_is_a_no_op_and_a_damaged_one_is_mended(artifact):
    words = ("build", "mlp", "--scheme", "full", "--batch", BATCH, "-o", artifact)
    before = {p: p.stat().st_mtime_ns for p in artifact.iterdir()}
    again = facts(*words, "--optimizer", "adam")
    assert again["up_to_date"] is True
    assert before == {p: p.stat().st_mtime_ns for p in artifact.iterdir()}
    (artifact / "pocktvm.h").write_text("")
    assert facts(*words, "--optimizer", "adam")["up_to_date"] is False
    assert (artifact / "pocktvm.h").stat().st_size > 100


def test_the_loss_falls_without_data(artifact):
    result = facts("run", artifact, "--steps", 30)
    assert len(result["losses"]) == 30 and result["losses"][-1] < result["losses"][0]
    assert result["step_ms_median"] > 0 and result["peak_rss_bytes"] > 0
    assert result["emulated"] is False


def test_resuming_equals_never_having_stopped(artifact, data, place):
    whole, first, second = (place / f"{name}.safetensors" for name in ("whole", "first", "second"))
    common = ("run", artifact, "--data", data)
    losses = facts(*common, "--steps", 12, "--save", whole)["losses"]
    before = facts(*common, "--steps", 5, "--save", first)["losses"]
    after = facts(*common, "--steps", 12, "--resume", first, "--save", second)["losses"]
    assert [*before, *after] == losses
    assert whole.read_bytes() == second.read_bytes()


def test_every_format_trains_alike(artifact, data, place):
    folder = place / "folder"
    folder.mkdir()
    arrays = np.load(data)
    for name in arrays.files:
        np.save(folder / f"{name}.npy", arrays[name])
    common = ("run", artifact, "--steps", 4, "--data")
    assert facts(*common, folder)["losses"] == facts(*common, data)["losses"]


def test_eval_is_torchs_loss_over_every_sample(artifact, data):
    """19 samples in batches of 8: the last one is padded, and the padding is not counted."""
    import torch

    from pocktvm.frontend.resolve import resolve_model

    arrays = np.load(data)
    with torch.no_grad():
        logits = resolve_model("mlp", batch=BATCH).module.eval()(torch.tensor(arrays["x"]))
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(arrays["y"]))
    result = facts("eval", artifact, "--data", data)
    assert result["samples"] == SAMPLES
    assert result["loss"] == pytest.approx(float(expected), rel=1e-5)
    hits = float((logits.argmax(1).numpy() == arrays["y"]).mean())
    assert result["accuracy"] == pytest.approx(hits)


def test_training_shows_in_eval(artifact, data, place):
    saved = place / "trained.safetensors"
    cli("run", artifact, "--data", data, "--steps", 60, "--lr", 0.01, "--save", saved)
    before = facts("eval", artifact, "--data", data)["loss"]
    after = facts("eval", artifact, "--data", data, "--resume", saved)["loss"]
    assert after < 0.7 * before
    assert {n for n in load_file(saved) if n.startswith("fc")} >= {"fc.weight", "fc.bias"}


def children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(p) for p in path.read_text().split()] if path.exists() else []


def start_training(artifact: Path, *words: object) -> tuple[subprocess.Popen, int]:
    command = [sys.executable, "-m", "pocktvm", "run", str(artifact), "--steps", "100000000"]
    parent = subprocess.Popen([*command, *(str(w) for w in words)], stdout=subprocess.DEVNULL)
    wait_until(lambda: children(parent.pid), parent)
    return parent, children(parent.pid)[0]


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's /proc")
def test_the_trainer_dies_with_its_parent(artifact):
    parent, child = start_training(artifact)
    parent.kill()
    parent.wait()
    wait_until(lambda: gone(child))


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's /proc")
def test_stopping_leaves_a_checkpoint(artifact, place):
    saved = place / "stopped.safetensors"
    parent, child = start_training(artifact, "--save", saved, "--save-every", "200ms")
    wait_until(saved.exists, parent)
    os.kill(child, signal.SIGTERM)
    assert parent.wait(PATIENCE) == 128 + signal.SIGTERM
    facts("run", artifact, "--resume", saved, "--steps", 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--data", "nowhere.npz"), "no data at nowhere.npz"),
        (("--resume", "{artifact}/weights.safetensors"), "not a checkpoint"),
        (("--resume", "{artifact}/pocktvm.h"), "pocktvm.h"),
    ],
)
def test_wrong_files_are_one_message(artifact, words, message):
    done = cli("run", artifact, *(w.format(artifact=artifact) for w in words), code=1)
    assert message in done.stderr and len(done.stderr.splitlines()) <= 25 and not done.stdout


def test_bad_labels_are_refused_before_a_step(artifact, place):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((9, 64)).astype(np.float32), np.arange(9) + 2
    np.savez(place / "bad.npz", x=x, y=y)
    done = cli("run", artifact, "--data", place / "bad.npz", code=1)
    assert "'y' is 10 in sample 8; the model takes 0 to 9" in done.stderr


def test_a_truncated_library_is_refused(artifact, place):
    copy = place / "truncated"
    shutil.copytree(artifact, copy)
    library = copy / "model.so"
    library.write_bytes(library.read_bytes()[:1000])
    assert "model.so (changed)" in cli("run", copy, code=1).stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("mobilenet",), "mobilenetv2"),
        (("mlp:depht=2",), "depth"),
        (("nowhere.py:net",), "nowhere.py"),
        (("mlp", "--scheme", '{"fc.wieght": 1}'), "fc.weight"),
        (("mlp", "--loss", "hinge"), "cross_entropy"),
        (("mlp", "--optimizer", "adma"), "adam"),
        (("mlp", "--budget", "10KB"), "--budget"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, tuple) else "",
)
def test_what_a_build_refuses_says_what_there_is(words, message, place):
    out = place / "refused"
    done = cli("build", *words, "-o", out, code=1)
    assert message in done.stderr and len(done.stderr.splitlines()) <= 25
    assert not out.exists(), "nothing half-written"


def test_the_users_own_function(place):
    (place / "nets.py").write_text(
        "import torch\n"
        "def tiny(batch=3):\n"
        "    torch.manual_seed(0)\n"
        "    layers = torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 2)\n"
        "    net = torch.nn.Sequential(*layers)\n"
        "    return net, (torch.randn(batch, 5),)\n"
    )
    done = cli("build", f"{place}/nets.py:tiny", "--scheme", "full", "--batch", 4, cwd=place)
    folder = place / "build" / "host" / "nets_tiny"
    assert str(folder.relative_to(place)) in done.stdout
    assert read_manifest(folder)["batch"] == 4


def emulators() -> list:
    """Targets with an emulator, those that cannot run here skipped with the reason."""
    cases = []
    for target in list_targets():
        if not target.emulator or target.is_gpu:  # tests/test_cuda_artifacts.py
            continue
        missing = lacks(target)
        skip = pytest.mark.skipif(bool(missing), reason=missing or "it runs here")
        cases.append(pytest.param(target.name, marks=skip))
    return cases


@pytest.mark.emulated
@pytest.mark.parametrize("target", emulators())
def test_emulated_targets_give_the_hosts_losses(artifact, place, target):
    out = place / target
    words = ("--target", target, "--scheme", "full", "--batch", BATCH, "--optimizer", "adam")
    cli("build", "mlp", *words, "-o", out)
    emulated, native = (facts("run", folder, "--steps", 5) for folder in (out, artifact))
    assert emulated["emulated"] is True and emulated["peak_rss_bytes"] is None
    np.testing.assert_allclose(emulated["losses"], native["losses"], rtol=1e-4)
