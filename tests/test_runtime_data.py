"""Batches from files: their order, the dtypes a device reads, and what is refused."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import runtime_case as case
from runtime_fixtures import artifact, run
from safetensors.numpy import save_file

from pocktvm.runtime.trainer import load


@pytest.fixture
def folder(tmp_path_factory):
    return artifact(tmp_path_factory, "host")


def samples(n, seed=3):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, case.D)).astype(np.float32)
    return {"x": x, "y": rng.integers(0, case.C, n).astype(np.int64)}


def write(path, arrays):
    save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, path)
    return path


def mix(h):
    """murmur3's finalizer, as in runtime/c/generate.c."""
    h &= 0xFFFFFFFF
    h = ((h ^ h >> 16) * 0x85EBCA6B) & 0xFFFFFFFF
    h = ((h ^ h >> 13) * 0xC2B2AE35) & 0xFFFFFFFF
    return h ^ h >> 16


def shuffled(i, n, seed, epoch):
    key = mix((seed & 0xFFFFFFFF) ^ mix((seed >> 32) ^ mix(epoch + 1)))
    half = 1
    while 1 << 2 * half < n:
        half += 1
    mask = (1 << half) - 1
    while True:
        left, right = i >> half, i & mask
        for r in range(4):
            left, right = right, left ^ (mix(right ^ mix(key + r)) & mask)
        i = left << half | right
        if i < n:
            return i


@pytest.mark.parametrize("n", [8, 21, 100])
def test_an_epoch_sees_every_sample_once(n):
    for seed, epoch in [(0, 0), (0, 1), (7, 0)]:
        assert sorted(shuffled(i, n, seed, epoch) for i in range(n)) == list(range(n))
    assert [shuffled(i, n, 0, 0) for i in range(n)] != [shuffled(i, n, 0, 1) for i in range(n)]


def test_order_depends_on_seed_and_epoch_and_survives_a_resume(folder, tmp_path):
    n, seed = 21, 5
    data = samples(n)
    path = write(tmp_path / "d.safetensors", data)
    whole = run(folder, "--data", path, "--steps", 7, "--seed", seed)["losses"]
    reference, expected = case.Reference(case.parameters()), []
    for step in range(7):
        epoch, at = divmod(step, n // case.N)  # the last five samples of an epoch are dropped
        rows = [shuffled(at * case.N + b, n, seed, epoch) for b in range(case.N)]
        expected.append(reference.step(data["x"][rows], data["y"][rows]))
    np.testing.assert_allclose(whole, expected, rtol=1e-4)
    first = run(folder, "--data", path, "--steps", 3, "--seed", seed, "--save", tmp_path / "c")
    rest = run(folder, "--data", path, "--steps", 7, "--seed", seed, "--resume", tmp_path / "c")
    assert first["losses"] + rest["losses"] == whole


def test_one_epoch_is_the_default(folder, tmp_path):
    path = write(tmp_path / "d.safetensors", samples(50))
    assert run(folder, "--data", path)["steps"] == 50 // case.N


def _change(**arrays):
    return lambda data: {**data, **arrays}


REFUSED = {
    "no labels": (lambda d: {"x": d["x"]}, "has no 'y'; its keys are: x"),
    "wrong sample": (_change(x=np.zeros((20, 5), np.float32)), r"'x' has samples of F32 \[5\]"),
    "wrong dtype": (_change(x=np.zeros((20, 12), np.float16)), "'x' has samples of F16"),
    "uint8 unasked": (_change(x=np.zeros((20, 12), np.uint8)), "'x' has samples of U8"),
    "counts": (_change(y=np.zeros(19, np.int32)), "'y' has 19 samples, 'x' has 20"),
    "few": (lambda d: {k: v[:7] for k, v in d.items()}, "has 7 samples, one batch .* has 8"),
    "label": (_change(y=np.arange(20)), "'y' is 5 in sample 5; this model takes 0 to 4"),
    "negative": (_change(y=np.full(20, -1, np.int32)), "'y' is -1 in sample 0"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_unfit_data_is_refused_before_the_first_step(folder, tmp_path, kind):
    change, message = REFUSED[kind]
    path = write(tmp_path / "d.safetensors", change(samples(20)))
    done = run(folder, "--data", path, "--progress", check=False)
    assert done.returncode == 1 and "progress" not in done.stderr
    assert re.search(message, done.stderr) and len(done.stderr.splitlines()) == 1


def test_nan_names_the_samples(folder, tmp_path):
    data = samples(8)
    data["x"][6, 2] = np.inf
    done = run(folder, "--data", write(tmp_path / "d", data), "--steps", 5, check=False)
    assert done.returncode == 1
    assert "'x' is infinite at [" in done.stderr and "samples " in done.stderr


def test_truncated_data_is_refused(folder, tmp_path):
    path = write(tmp_path / "d.safetensors", samples(20))
    path.write_bytes(path.read_bytes()[:-40])
    done = run(folder, "--data", path, check=False)
    assert done.returncode == 1 and "truncated" in done.stderr


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """The same network, its twelve inputs seen as 3x2x2 images with a mean and a scale."""
    x = replace(
        case.X, shape=(case.N, 3, 2, 2), mean=(120.0, 110.0, 100.0), scale=(0.01, 0.02, 0.03)
    )
    return case.build("host", tmp_path_factory.mktemp("images") / "tiny", inputs=(x, case.Y))


def test_uint8_images_are_normalised_on_the_device(images, tmp_path):
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (16, 3, 2, 2)).astype(np.uint8)
    mean, scale = (np.float32(v) for v in ([120, 110, 100], [0.01, 0.02, 0.03]))
    floats = (raw.astype(np.float32) - mean.reshape(3, 1, 1)) * scale.reshape(3, 1, 1)
    y = rng.integers(0, case.C, 16).astype(np.int32)
    outputs = []
    with load(images, threads=1) as trainer:
        for x in (raw, raw.transpose(0, 2, 3, 1), floats):
            outputs.append(trainer.predict(np.ascontiguousarray(x[: case.N])).tobytes())
    assert outputs[0] == outputs[1] == outputs[2]
    losses = []
    for name, x in {"chw": raw, "hwc": raw.transpose(0, 2, 3, 1), "float": floats}.items():
        path = write(tmp_path / f"{name}.safetensors", {"x": x, "y": y})
        losses.append(run(images, "--data", path, "--steps", 4)["losses"])
    assert losses[0] == losses[1] == losses[2]
