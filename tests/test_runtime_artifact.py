"""Artifacts train, predict and refuse, here and under an emulator."""

from __future__ import annotations

import ctypes
import hashlib
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import runtime_case as case
from runtime_fixtures import artifact, emulator, run

from pocktvm.codegen import link, package
from pocktvm.errors import PockError
from pocktvm.runtime.trainer import load
from pocktvm.targets import load_target

TARGETS = ["host", pytest.param("rpi4", marks=pytest.mark.emulated)]
EXPORTS = {"open", "close", "step", "predict", "save", "load", "tensor", "plan", "last_error"}


@pytest.fixture(params=TARGETS)
def folder(request, tmp_path_factory):
    emulator(request.param)
    return artifact(tmp_path_factory, request.param)


@pytest.fixture
def host(tmp_path_factory):
    return artifact(tmp_path_factory, "host")


def test_training_follows_the_reference(folder):
    """Ten steps with a learning rate that changes: float32 kernels against float64 numpy."""
    reference, (x, y) = case.Reference(case.parameters()), case.batch()
    with load(folder, threads=2) as trainer:
        np.testing.assert_allclose(trainer.predict(x), reference.logits(x), atol=1e-5)
        for t in range(10):
            lr = case.LR / (1 + t)
            assert trainer.step(x, y.astype(np.int64), lr=lr) == pytest.approx(
                reference.step(x, y, lr), rel=1e-4, abs=1e-6
            )
        state = trainer.state_dict()
        assert trainer.steps == 10
    assert set(state) == {*reference.w, "tied.weight"}
    for name, expected in reference.w.items():
        np.testing.assert_allclose(state[name], expected, atol=2e-6)
    np.testing.assert_array_equal(state["tied.weight"], state["head.weight"])
    np.testing.assert_array_equal(state["fc.bias"], case.parameters()["fc.bias"])  # frozen: bits


def test_the_number_of_threads_changes_no_bit(host):
    x, y = case.batch()
    results = []
    for threads in (1, 2, 5):
        with load(host, threads=threads) as trainer:
            assert trainer.threads == threads
            results.append([trainer.step(x, y) for _ in range(20)])
            results[-1] += [trainer.state_dict()["fc.weight"].tobytes()]
    assert results[0] == results[1] == results[2]


def test_two_trainers_of_one_artifact_are_independent(host):
    x, y = case.batch()
    with load(host) as a, load(host) as b:
        first = a.step(x, y)
        a.step(x, y)
        assert b.step(x, y) == first


def test_the_made_up_batch_is_the_same_everywhere_and_its_loss_falls(tmp_path_factory):
    host = run(artifact(tmp_path_factory, "host"), "--steps", 6)["losses"]
    prefix = emulator("rpi4")
    other = run(artifact(tmp_path_factory, "rpi4"), "--steps", 6, "--emulated", prefix=prefix)
    assert host[-1] < host[0]
    np.testing.assert_allclose(other["losses"], host, rtol=1e-4)
    assert other["emulated"] and other["peak_rss_bytes"] is None


def test_json_of_a_run(host):
    result = run(host, "--steps", 3, "--threads", 1, "--profile")
    assert len(result["losses"]) == 3 and result["steps"] == 3 and result["threads"] == 1
    assert result["measured_bytes"] == result["peak_rss_bytes"] - result["rss_open_bytes"]
    assert result["arena_bytes"] >= result["lower_bound_bytes"] > 0
    labels = [c.label for c in case.programs()["step"].calls]
    assert [label for label, _ in result["profile"]] == labels


def test_self_test(folder, tmp_path):
    manifest = json.loads((folder / "manifest.json").read_text())
    prefix = emulator(manifest["target"])
    good = run(folder, "--selftest", prefix=prefix, check=False)
    assert good.returncode == 0 and good.stdout.startswith("PASS")
    broken = shutil.copytree(folder, tmp_path / "broken")
    weights = bytearray((broken / "weights.safetensors").read_bytes())
    weights[-2] ^= 0x40  # an exponent bit of the last weight
    (broken / "weights.safetensors").write_bytes(weights)
    bad = run(broken, "--selftest", prefix=prefix, check=False)
    assert bad.returncode == 1 and bad.stdout.startswith("FAIL")


def test_only_the_interface_is_exported(host):
    library = ctypes.CDLL(str(host / "model.so"))
    for name in EXPORTS:
        assert hasattr(library, f"pocktvm_{name}")
    for name in ("__tvm_ffi_fc", "__TVMBackendParallelLaunch", "pk_fail", "st_open"):
        assert not hasattr(library, name)


def test_the_caller_may_bring_the_arena(host, tmp_path):
    """pocktvm.h compiles as C and C++ with all warnings, and an arena is checked."""
    source = tmp_path / "client.cpp"
    source.write_text(CLIENT)
    program = tmp_path / "client"
    command = [sys.executable, "-m", "ziglang", "c++", "-std=c++11", "-Wall", "-Wextra", "-Werror",
               "-pedantic", f"-I{host}", str(source), str(host / "model.so"), f"-Wl,-rpath,{host}",
               "-o", str(program)]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, text=True)
    done = subprocess.run([program], capture_output=True, text=True, check=True)
    small, misaligned, first, last = done.stdout.splitlines()
    assert "needs" in small and "needs" in misaligned
    losses = run(host, "--steps", 4)["losses"]
    assert (float(first), float(last)) == (losses[0], losses[3]) or float(last) < float(first)


CLIENT = r"""
#include <cstdio>
#include <cstdlib>
#include <vector>
#include "pocktvm.h"
int main() {
  const pocktvm_plan_info *plan = pocktvm_plan(nullptr);
  void *arena = nullptr;
  size_t room = size_t(plan->arena_bytes) + 64;
  if (posix_memalign(&arena, 64, room)) return 1;
  pocktvm_options options = pocktvm_options();
  pocktvm *model = nullptr;
  options.arena = arena;
  options.arena_bytes = plan->arena_bytes - 1;
  if (pocktvm_open(&options, &model) != POCKTVM_NO_MEMORY || model) return 2;
  std::puts(pocktvm_last_error(nullptr));
  options.arena = static_cast<char *>(arena) + 4;
  options.arena_bytes = plan->arena_bytes;
  if (pocktvm_open(&options, &model) != POCKTVM_NO_MEMORY) return 3;
  std::puts(pocktvm_last_error(nullptr));
  options.arena = arena;
  if (pocktvm_open(&options, &model)) return 4;
  std::vector<float> x(8 * 12);
  std::vector<int32_t> y(8);
  for (size_t i = 0; i < x.size(); i++) x[i] = float(i % 7) - 3;
  for (size_t i = 0; i < y.size(); i++) y[i] = int32_t(i % 5);
  pocktvm_array batch[] = {{x.data(), POCKTVM_FLOAT32}, {y.data(), POCKTVM_INT32}};
  float first = 0, loss = 0;
  for (int i = 0; i < 4; i++) {
    if (pocktvm_step(model, batch, plan->lr, &loss)) return 5;
    if (i == 0) first = loss;
  }
  std::printf("%.9g\n%.9g\n", double(first), double(loss));
  pocktvm_close(model);
  std::free(arena);
}
"""


def test_the_manifest_holds_every_file(host):
    manifest = json.loads((host / "manifest.json").read_text())
    names = {p.name for p in host.iterdir()} - {"manifest.json"}
    assert set(manifest["files"]) == names
    for name, entry in manifest["files"].items():
        assert hashlib.sha256((host / name).read_bytes()).hexdigest() == entry["sha256"]
    keys = "target model scheme batch updated plan kernels versions inputs output_shape".split()
    assert set(keys) <= set(manifest)
    assert manifest["kernels"] == {"tuned": 0, "rule": 10, "fallback": 0, "untuned": 0}
    assert [entry["label"] for entry in manifest["inputs"]] == [False, True]


@pytest.mark.parametrize("share", [0.02, 0.5, 0.999])
def test_a_truncated_library_is_refused(host, tmp_path, share):
    copy = shutil.copytree(host, tmp_path / "copy")
    data = (copy / "model.so").read_bytes()
    (copy / "model.so").write_bytes(data[: int(len(data) * share)])
    done = run(copy, check=False)
    assert done.returncode == 1 and "truncated" in done.stderr and done.stderr.count("\n") == 1
    with pytest.raises(PockError, match=r"model.so"):
        load(copy)


def test_foreign_folders_are_refused(host, tmp_path):
    copy = shutil.copytree(host, tmp_path / "copy")
    (copy / "model.so").write_text("not a library")
    assert "is not a library" in run(copy, check=False).stderr
    shutil.copy(shutil.which("python3") or sys.executable, copy / "model.so")
    assert run(copy, check=False).returncode == 1
    (copy / "model.so").unlink()
    assert "No such file" in run(copy, check=False).stderr
    with pytest.raises(PockError, match="no artifact"):
        load(tmp_path)


def test_usage_errors_exit_with_2(host):
    for bad in (["--steps", "-1"], ["--steps"], ["--lr", "x"], ["--wat"], ["--save-every", "1s"]):
        done = run(host, *bad, check=False)
        assert done.returncode == 2 and "usage" in done.stderr, bad


def test_bad_input_is_refused_and_changes_nothing(host):
    x, y = case.batch()
    with load(host, threads=1) as trainer:
        before = trainer.state_dict()["fc.weight"].tobytes()
        nan = x.copy()
        nan[3, 7] = np.nan
        bad = y.copy()
        bad[5] = case.C
        for arrays, message in [
            ((nan, y), r"'x' is NaN at \[3, 7\]"),
            ((x, bad), r"'y' is 5 at \[5\]; this model takes 0 to 4"),
            ((x, bad.astype(np.int64) - 2**40), r"'y' is -"),
            ((x[:4], y), r"'x' has shape \(4, 12\).*\(8, 12\)(.|\n)*give 8 samples"),
            ((x.astype(np.float64), y), r"'x' is float64, .*float32"),
            ((x, y.astype(np.float32)), r"'y' is float32, .*int32 or int64"),
            ((x,), r"step takes 2 arrays \(x, y\), not 1"),
            ((x.astype(np.uint8), y), "without mean and scale"),
        ]:
            with pytest.raises(PockError, match=message):
                trainer.step(*arrays)
        with pytest.raises(PockError, match="lr"):
            trainer.step(x, y, lr=float("nan"))
        assert trainer.state_dict()["fc.weight"].tobytes() == before and trainer.steps == 0
    with pytest.raises(PockError, match="closed"):
        trainer.step(x, y)


def test_a_foreign_target_without_its_emulator_says_how_to_get_it(tmp_path_factory, monkeypatch):
    folder = artifact(tmp_path_factory, "rpi4")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(PockError, match="qemu-user"):
        load(folder)


def test_weights_too_large_to_embed_lie_beside_the_library(tmp_path, monkeypatch):
    monkeypatch.setenv("POCKTVM_EMBED_LIMIT", "10")
    folder = case.build("host", tmp_path / "tiny")
    assert (folder / "frozen.bin").is_file()
    assert run(folder, "--selftest", check=False).stdout.startswith("PASS")
    (folder / "frozen.bin").write_bytes(b"")
    assert "frozen.bin is missing or truncated" in run(folder, check=False).stderr


def test_rebuilding_keeps_the_users_files_and_refuses_other_folders(tmp_path):
    out = tmp_path / "tiny"
    case.build("host", out)
    (out / "user.safetensors").write_text("mine")
    case.build("host", out, state=case.parameters(seed=5))
    assert (out / "user.safetensors").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["tiny"]
    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.jpg").write_text("cat")
    with pytest.raises(PockError, match="holds other files"):
        case.build("host", other)
    (tmp_path / "file").write_text("")
    with pytest.raises(PockError, match="is a file"):
        case.build("host", tmp_path / "file")


def test_a_full_disk_leaves_the_old_artifact(tmp_path, monkeypatch):
    out = case.build("host", tmp_path / "tiny")
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(package, "_file", full)
    with pytest.raises(PockError, match="the disk is full"):
        case.build("host", out)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["tiny"]


def test_the_runtime_is_compiled_once_per_target():
    toolchain = load_target("host").toolchain
    first = link.runtime_objects(toolchain)
    stamps = [p.stat().st_mtime_ns for p in first]
    assert [p.stat().st_mtime_ns for p in link.runtime_objects(toolchain)] == stamps
