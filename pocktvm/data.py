"""Datasets from files: safetensors, npz, or a folder of npy; keys are input names plus `y`.

Axis 0 is samples. What the device reads is safetensors with float32, uint8, int32 and int64
tensors, so other formats and types are converted into a temporary file, after every check that is
cheaper here than on a device. Images of uint8 may have their channels first or last.

Imports neither torch nor TVM.
"""

from __future__ import annotations

import contextlib
import difflib
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from pocktvm.errors import PockError
from pocktvm.ir.model import Input

LABELS = "y"
FORMATS = "a .safetensors file, an .npz file, or a folder of .npy files"
_CHUNK = 1 << 22  # elements looked at together, so that a mapped file is never read whole


def read_data(path: str | Path) -> dict[str, np.ndarray]:
    """Arrays by name; npy files are mapped, not read. PockError: missing, foreign, truncated."""
    path = Path(path)
    if not path.exists():
        raise PockError(f"no data at {path}: --data takes {FORMATS}")
    try:
        if path.is_dir():
            arrays = {p.stem: np.load(p, mmap_mode="r") for p in sorted(path.glob("*.npy"))}
        elif path.suffix == ".npz":
            if not zipfile.is_zipfile(path):
                raise ValueError("it is no archive as numpy.savez writes it, or it is truncated")
            with np.load(path) as archive:
                arrays = {name: archive[name] for name in archive.files}
        elif path.suffix == ".safetensors":
            from safetensors.numpy import load_file

            arrays = load_file(path)
        else:
            raise PockError(f"{path} is no data set: --data takes {FORMATS}")
    except PockError:
        raise
    except Exception as error:  # every format has errors of its own for a damaged file
        raise PockError(f"cannot read {path}: {error}\n  --data takes {FORMATS}.") from error
    if not arrays:
        raise PockError(f"{path} holds no arrays: --data takes {FORMATS}")
    return arrays


def check_data(
    arrays: Mapping[str, np.ndarray],
    inputs: Sequence[Input],
    *,
    where: str = "the data",
    whole_batch: bool = True,
    labels_optional: bool = False,
) -> dict[str, np.ndarray]:
    """The arrays as the device reads them, in the inputs' order.

    `inputs` are the model's, labels last. Small integers become int32, other floats float32, uint8
    stays where a float input is normalised on the device. PockError: a missing or an extra key, a
    sample's shape, a dtype, a label out of range, NaN, differing counts, fewer samples than a batch
    (`whole_batch`).
    """
    arrays = _rename_labels(arrays, inputs)
    wanted = [i for i in inputs if i.name in arrays or not (labels_optional and i is inputs[-1])]
    _check_keys(arrays, wanted, where)
    checked = {i.name: _check_array(arrays[i.name], i, where) for i in wanted}
    counts = {name: len(array) for name, array in checked.items()}
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{name}: {count}" for name, count in counts.items())
        raise PockError(f"{where}: axis 0 is samples, but the counts differ: {told}")
    batch, count = inputs[0].shape[0] if inputs[0].shape else 1, min(counts.values(), default=0)
    if not count:
        raise PockError(f"{where} is empty: 0 samples. Give at least one batch of {batch}.")
    if count < (batch if whole_batch else 1):
        raise PockError(
            f"{where} has {count} samples, fewer than one batch of {batch}.\n"
            f"  Build with --batch {count} or smaller, or give more samples."
        )
    return checked


@contextlib.contextmanager
def device_file(path: str | Path, inputs: Sequence[Input]) -> Iterator[Path]:
    """A checked safetensors file that the runner can read; `path` itself where it already is one.

    A conversion lies in a temporary folder that goes when the context ends.
    """
    path = Path(path)
    raw = read_data(path)
    arrays = check_data(raw, inputs, where=str(path))
    same = all(name in raw and raw[name].dtype == a.dtype for name, a in arrays.items())
    if path.suffix == ".safetensors" and same:
        yield path.resolve()
        return
    from safetensors.numpy import save_file

    with tempfile.TemporaryDirectory(prefix="pocktvm-data-") as folder:
        converted = Path(folder) / "data.safetensors"
        save_file({n: np.ascontiguousarray(a) for n, a in sorted(arrays.items())}, converted)
        yield converted


def _rename_labels(
    arrays: Mapping[str, np.ndarray], inputs: Sequence[Input]
) -> dict[str, np.ndarray]:
    """The key `y` means the labels, the last input, whatever the model calls it."""
    names = [i.name for i in inputs]
    out = dict(arrays)
    if LABELS in out and names and LABELS not in names and names[-1] not in out:
        out[names[-1]] = out.pop(LABELS)
    return out


def _check_keys(arrays: Mapping[str, np.ndarray], inputs: Sequence[Input], where: str) -> None:
    names = [i.name for i in inputs]
    missing = [n for n in names if n not in arrays]
    extra = [n for n in arrays if n not in names]
    if not missing and not extra:
        return
    lines = [f"{where} does not fit the model, which reads {', '.join(names)}:"]
    for name in missing[:8]:
        near = difflib.get_close_matches(name, extra, n=1, cutoff=0.4)
        lines.append(f"  missing '{name}'" + (f" (is it '{near[0]}'?)" if near else ""))
    lines += [f"  unknown '{name}'" for name in extra[:8]]
    raise PockError("\n".join(lines))


def _check_array(array: np.ndarray, spec: Input, where: str) -> np.ndarray:
    """One array in the device's dtype, its sample shape and values checked."""
    here = f"{where}: '{spec.name}'"
    found, sample = tuple(array.shape[1:]), tuple(spec.shape[1:])
    channels_last = array.dtype == np.uint8 and _channels_first(found) == sample
    if array.ndim != len(spec.shape) or (found != sample and not channels_last):
        raise PockError(
            f"{here} has samples of shape {found}, the model reads {sample}."
            + _shape_hint(found, sample)
        )
    if spec.dtype == "float32":
        if array.dtype == np.uint8:
            return _check_normalised(array, spec, here)
        if array.dtype.kind not in "fiub":
            raise PockError(f"{here} is {array.dtype}; the model reads float32 (or uint8)")
        _check_finite(array, here)
        return array.astype(np.float32, copy=False)
    if array.dtype.kind not in "iub":
        raise PockError(f"{here} is {array.dtype}; the model reads integers (int32 or int64)")
    _check_bound(array, spec, here)
    return array if array.dtype == np.int64 else array.astype(np.int32, copy=False)


def _channels_first(sample: tuple[int, ...]) -> tuple[int, ...]:
    return (sample[2], sample[0], sample[1]) if len(sample) == 3 else ()


def _check_normalised(array: np.ndarray, spec: Input, here: str) -> np.ndarray:
    if not spec.mean:
        raise PockError(
            f"{here} is uint8, but the model was built with no mean and scale for it.\n"
            "  Give float32 samples, normalised as the model was trained."
        )
    return array


def _shape_hint(found: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    if _channels_first(found) == wanted:
        return "\n  Images are channels first: array.transpose(0, 3, 1, 2)."
    if len(found) == 3 and len(wanted) == 3:
        return "\n  Resize the images, or build for this size (…,image=N with a zoo model)."
    return ""


def _chunks(array: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Pieces of a few million elements, with the first sample's index."""
    per_sample = max(1, array[0].size if len(array) else 1)
    step = max(1, _CHUNK // per_sample)
    for start in range(0, len(array), step):
        yield start, np.asarray(array[start : start + step])


def _check_finite(array: np.ndarray, here: str) -> None:
    if array.dtype.kind != "f":
        return
    for start, piece in _chunks(array):
        bad = ~np.isfinite(piece.reshape(len(piece), -1)).all(axis=1)
        if bad.any():
            raise PockError(
                f"{here} holds NaN or infinity, first in sample {start + int(bad.argmax())}.\n"
                "  Training on it would destroy the weights: mend or drop those samples."
            )


def _check_bound(array: np.ndarray, spec: Input, here: str) -> None:
    """Indices outside [0, bound), except `ignore_index`, are named with the first sample."""
    if spec.bound is None:
        return
    for start, piece in _chunks(array):
        bad = (piece < 0) | (piece >= spec.bound)
        if spec.ignore_index is not None:
            bad &= piece != spec.ignore_index
        rows = bad.reshape(len(piece), -1).any(axis=1)
        if rows.any():
            value = piece[bad][0]
            raise PockError(
                f"{here} is {value} in sample {start + int(rows.argmax())}; the model takes "
                f"0 to {spec.bound - 1}.\n  Number the classes from 0, or build with more of them."
            )
