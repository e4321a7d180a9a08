"""Whole models on a GPU that is not there: artifacts as shipped, their driver replaced.

The library is loaded as on a device and finds a libcuda.so.1 that keeps device memory apart and
replays every launch in C (tests/cuda/driver.cpp). `cuda` runs so natively, `jetson-orin` under
qemu-aarch64. What the GPU itself would make of the kernels is ptxas's to say (test_cuda_rules.py).
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from binary_headers import read_binary
from cuda_replay import build_driver
from test_targets_artifacts import FUNCTIONS, LIBC, MODELS, ROOT, assert_equal_losses

from pocktvm.cli.targets import lacks
from pocktvm.codegen.cuda import lacks_compiler
from pocktvm.manifest import runs_here
from pocktvm.targets import load_target

pytestmark = [
    pytest.mark.build,
    pytest.mark.skipif(bool(lacks_compiler()), reason=lacks_compiler()),
]
SLOW = [pytest.param(m, marks=pytest.mark.slow) for m in MODELS if m != "mlp"]
_FOLDER = tempfile.TemporaryDirectory(prefix="pocktvm-cuda-")  # gone with the process
WORK = Path(_FOLDER.name)


def skip_unless_it_starts(target: str) -> None:
    device = load_target(target)
    if not device.emulator and not runs_here({"arch": device.arch, "os": device.os}):
        pytest.skip("the host is no x86-64 Linux")
    if device.emulator and "there is no GPU in it" not in lacks(device):
        pytest.skip(lacks(device))


@functools.cache
def built(model: str, target: str) -> tuple[Path, Path]:
    """(the artifact, a folder with the driver that replays its kernels)."""
    spec, batch, lr, scheme = MODELS[model]
    out, dump = WORK / target / model, WORK / target / f"{model}.dump"
    call("build", spec, "--target", target, "--batch", batch, "--lr", lr, "--scheme", scheme,
         "-o", out, POCKTVM_DUMP=str(dump))  # fmt: skip
    if target == "host":
        return out, out
    toolchain = load_target(target).toolchain
    foreign = ("-target", toolchain.zig_target)
    return out, build_driver(dump / "kernels.cu", dump / "driver", foreign)


def run_python(words: list[object], **more: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **more}
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True,
                          timeout=900, env=environment)  # fmt: skip


def call(*words: object, **more: str) -> dict:
    """A command's JSON object."""
    done = run_python(["-m", "pocktvm", *words, "--json"], **more)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def train(model: str, target: str, *words: object, **more: str) -> dict:
    """Ten steps of the generated batch, and what they leave in a checkpoint."""
    artifact, driver = built(model, target)
    return call("run", artifact, "--steps", 10, *words, LD_LIBRARY_PATH=str(driver), **more)


def state(path: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(path)


@pytest.mark.parametrize("model", ["mlp", *SLOW])
@pytest.mark.parametrize("target", ["cuda", pytest.param("jetson-orin",
                                                         marks=pytest.mark.emulated)])
def test_ten_steps_and_the_weights_are_the_hosts(target, model):
    skip_unless_it_starts(target)
    found = {}
    for name in (target, "host"):
        checkpoint = WORK / f"{name}-{model}.safetensors"
        found[name] = train(model, name, "--save", checkpoint), state(checkpoint)
    assert_equal_losses(found[target][0], target, found["host"][0])
    ours, hosts = found[target][1], found["host"][1]
    assert ours.keys() == hosts.keys()
    for name, value in ours.items():
        scale = max(1.0, float(np.abs(hosts[name]).max()))
        np.testing.assert_allclose(value, hosts[name], rtol=0, atol=1e-4 * scale, err_msg=name)


def test_the_library_needs_libc_alone_and_holds_both_kinds_of_code():
    for target in ("cuda", "jetson-orin"):
        artifact = built("mlp", target)[0]
        library = read_binary(artifact / "model.so")
        assert library.machine == load_target(target).arch and library.exports == FUNCTIONS
        assert {n for n in library.needed if not n.startswith("ld-linux")} <= LIBC
        data = (artifact / "model.so").read_bytes()
        ptx = load_target(target).toolchain.ptx.removeprefix("compute_")
        assert f".target sm_{ptx}".encode() in data
        machine_190 = (190).to_bytes(2, "little")  # CUDA, in an ELF header
        starts = [i for i in range(1, len(data)) if data.startswith(b"\x7fELF", i)]
        cubins = [i for i in starts if data[i + 18 : i + 20] == machine_190]
        assert len(cubins) == len(load_target(target).toolchain.cubins)


def test_the_self_test_passes_on_the_replayed_gpu():
    skip_unless_it_starts("cuda")
    artifact, driver = built("mlp", "cuda")
    done = subprocess.run([artifact / "pocktvm-run", artifact, "--selftest"], capture_output=True,
                          text=True, env={**os.environ, "LD_LIBRARY_PATH": str(driver)})
    assert done.returncode == 0 and "PASS" in done.stdout, done.stderr


def test_resuming_equals_never_having_stopped():
    skip_unless_it_starts("cuda")
    part, whole, rest = (WORK / f"{n}.safetensors" for n in ("part", "whole", "rest"))
    train("mlp", "cuda", "--save", whole)
    artifact, driver = built("mlp", "cuda")
    call("run", artifact, "--steps", 4, "--save", part, LD_LIBRARY_PATH=str(driver))
    train("mlp", "cuda", "--resume", part, "--save", rest)
    assert rest.read_bytes() == whole.read_bytes()


def test_python_reads_the_state_from_the_gpu_and_writes_it_back():
    skip_unless_it_starts("cuda")
    artifact, driver = built("mlp", "cuda")
    code = (
        "import sys, numpy as np, pocktvm\n"
        "t = pocktvm.load(sys.argv[1])\n"
        "rng = np.random.default_rng(0)\n"
        "x, y = rng.standard_normal((4, 20), np.float32), np.arange(4) % 5\n"
        "first = t.state_dict()\n"
        "a, before = t.step(x, y, lr=0.1), t.predict(x)\n"
        "assert any((t.state_dict()[n] != first[n]).any() for n in t.updated)\n"
        "for n in t.updated: t._live().set(n, first[n])\n"
        "b, again = t.step(x, y, lr=0.1), t.predict(x)\n"
        "assert a == b and (before == again).all(), (a, b)\n"
        "assert t.threads == 1 and t.steps == 2\n"
        "t.close()\n"
    )
    done = run_python(["-c", code, artifact], LD_LIBRARY_PATH=str(driver))
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_channels_chosen_while_it_trains_are_the_hosts():
    skip_unless_it_starts("cuda")
    code = (
        "import sys, json, numpy as np, pocktvm\n"
        "t = pocktvm.load(sys.argv[1])\n"
        "rng = np.random.default_rng(0)\n"
        "x, y = rng.standard_normal((4, 20), np.float32), np.arange(4) % 5\n"
        "losses = [t.step(x, y, lr=0.1) for _ in range(2)]\n"
        "name = next(iter(t.selection))\n"
        "t.select({name: np.arange(len(t.selection[name])) + 1})\n"
        "losses += [t.step(x, y, lr=0.1) for _ in range(2)]\n"
        "t.resample(7)\n"
        "losses += [t.step(x, y, lr=0.1) for _ in range(2)]\n"
        "print(json.dumps([losses, t.selection]))\n"
    )
    found = []
    for target in ("host", "cuda"):
        out, dump = WORK / target / "resampled", WORK / target / "resampled.dump"
        call("build", MODELS["mlp"][0], "--target", target, "--batch", 4, "--optimizer", "momentum",
             "--scheme", '{"*.weight": 0.5}', "--resample", "-o", out,
             POCKTVM_DUMP=str(dump))  # fmt: skip
        on_cuda = target == "cuda"
        driver = build_driver(dump / "kernels.cu", dump / "driver") if on_cuda else out
        done = run_python(["-c", code, out], LD_LIBRARY_PATH=str(driver))
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    (losses, selection), (on_gpu, there) = found
    assert selection == there and len(set(losses)) == len(losses)
    np.testing.assert_allclose(on_gpu, losses, rtol=1e-4)


@pytest.mark.parametrize(
    ("gpu", "message"),
    [
        ("none", "sees no GPU"),
        ("5.0 100", "is sm_50 and takes none of this artifact's code (sm_75, sm_80, sm_90, sm_1"),
        ("8.7 0.001", "GPU memory"),
    ],
)
def test_what_the_machine_lacks_is_one_line(gpu, message):
    skip_unless_it_starts("cuda")
    artifact, driver = built("mlp", "cuda")
    done = run_python(["-m", "pocktvm", "run", artifact], LD_LIBRARY_PATH=str(driver), FAKE_GPU=gpu)
    assert done.returncode == 1 and message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("gpu", ["8.6 100", "10.0 100"])
def test_other_gpus_take_a_cubin_or_the_ptx(gpu):
    skip_unless_it_starts("cuda")
    assert train("mlp", "cuda", FAKE_GPU=gpu)["steps"] == 10


def test_no_driver_is_one_line():
    skip_unless_it_starts("cuda")
    if not lacks(load_target("cuda")):
        pytest.skip("this machine has a GPU")
    for target in ("cuda", "jetson-orin"):
        artifact = built("mlp", target)[0]
        done = run_python(["-m", "pocktvm", "run", artifact])
        if "emulator" in lacks(load_target(target)):
            continue
        assert done.returncode == 1 and "no NVIDIA driver" in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_tuning_says_that_there_is_nothing_to_tune():
    done = run_python(["-m", "pocktvm", "tune", "mlp", "--target", "cuda"])
    assert done.returncode == 1 and "nothing to tune for cuda" in done.stderr
