"""Data sets: three formats, the same arrays; what does not fit is named before any step."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pocktvm.data import check_data, device_file, read_data
from pocktvm.errors import PockError
from pocktvm.ir.model import Input

IMAGES = Input("x", (4, 3, 8, 8), "float32", mean=(127.5,) * 3, scale=(0.01,) * 3)
LABELS = Input("y", (4,), "int32", bound=10, ignore_index=-100)


def arrays(n: int = 9) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, 3, 8, 8)).astype(np.float32)
    return {"x": x, "y": rng.integers(0, 10, n)}


def write(kind: str, tmp_path, data):
    if kind == "folder":
        path = tmp_path / "set"
        path.mkdir()
        for name, array in data.items():
            np.save(path / f"{name}.npy", array)
    elif kind == "npz":
        path = tmp_path / "set.npz"
        np.savez(path, **data)
    else:
        path = tmp_path / "set.safetensors"
        save_file(data, path)
    return path


@pytest.mark.parametrize("kind", ["folder", "npz", "safetensors"])
def test_every_format_reaches_the_device_as_the_same_file(kind, tmp_path):
    data = arrays()
    with device_file(write(kind, tmp_path, data), [IMAGES, LABELS]) as path:
        seen = load_file(path)
        assert seen["y"].dtype == np.int64 and seen["x"].dtype == np.float32
        np.testing.assert_array_equal(seen["x"], data["x"])
        np.testing.assert_array_equal(seen["y"], data["y"])
    assert path.exists() == (kind == "safetensors"), "a converted file goes"


def test_a_file_the_device_reads_is_used_as_it_lies(tmp_path):
    data = {"x": arrays()["x"], "y": arrays()["y"].astype(np.int32)}
    path = write("safetensors", tmp_path, data)
    with device_file(path, [IMAGES, LABELS]) as used:
        assert used == path.resolve()


def test_uint8_stays_for_the_device_to_normalise():
    data = {"x": np.zeros((4, 3, 8, 8), np.uint8), "y": np.zeros(4, np.int32)}
    assert check_data(data, [IMAGES, LABELS])["x"].dtype == np.uint8
    last = {"x": np.zeros((4, 8, 8, 3), np.uint8), "y": np.zeros(4, np.int32)}
    assert check_data(last, [IMAGES, LABELS])["x"].shape == (4, 8, 8, 3)
    plain = Input("x", IMAGES.shape, "float32")
    with pytest.raises(PockError, match="no mean and scale"):
        check_data(data, [plain, LABELS])


def change(**changes):
    return {k: v for k, v in {**arrays(), **changes}.items() if v is not None}


NAN = arrays()["x"].copy()
NAN[5, 0, 0, 0] = np.nan


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (change(y=None), "missing 'y'"),
        (change(x=None, images=arrays()["x"]), "missing 'x'.*\n  unknown 'images'"),
        (change(x=np.zeros((9, 3, 9, 9), np.float32)), r"\(3, 9, 9\), the model reads \(3, 8, 8\)"),
        (change(x=np.zeros((9, 8, 8, 3), np.float32)), r"transpose\(0, 3, 1, 2\)"),
        (change(x=np.array(["a"] * 9).reshape(9, 1, 1, 1)), "samples of shape"),
        (change(x=np.zeros((9, 3, 8, 8), np.complex64)), "is complex64"),
        (change(x=NAN), "NaN or infinity, first in sample 5"),
        (change(y=np.arange(9) + 3), r"'y' is 10 in sample 7; the model takes 0 to 9"),
        (change(y=np.full(9, -1)), "'y' is -1 in sample 0"),
        (change(y=np.zeros(9, np.float32)), "'y' is float32; the model reads integers"),
        (change(y=np.zeros(8, np.int64)), "counts differ: x: 9, y: 8"),
        ({k: v[:3] for k, v in arrays().items()}, "3 samples, fewer than one batch of 4"),
    ],
)
def test_what_does_not_fit_is_named(data, message):
    with pytest.raises(PockError, match=message):
        check_data(data, [IMAGES, LABELS])


def test_ignored_labels_and_short_sets_for_evaluation():
    data = {"x": arrays(3)["x"], "y": np.array([-100, 0, 9])}
    assert len(check_data(data, [IMAGES, LABELS], whole_batch=False)["y"]) == 3


@pytest.mark.parametrize("name", ["set.safetensors", "set.npz"])
def test_truncated_files(name, tmp_path):
    kind = "npz" if name.endswith("npz") else "safetensors"
    path = write(kind, tmp_path, arrays())
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(PockError, match="cannot read"):
        read_data(path)


def test_missing_and_foreign(tmp_path):
    with pytest.raises(PockError, match="no data at"):
        read_data(tmp_path / "none.npz")
    (tmp_path / "a.csv").write_text("1,2")
    with pytest.raises(PockError, match="no data set"):
        read_data(tmp_path / "a.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(PockError, match="holds no arrays"):
        read_data(tmp_path / "empty")


def test_no_pickles_are_read(tmp_path):
    path = tmp_path / "set.npz"
    np.savez(path, x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(PockError, match="cannot read"):
        read_data(path)
