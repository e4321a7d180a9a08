"""Safetensors with numpy alone: written deterministically, read with every size checked.

The trainer's machine may have neither torch nor the safetensors package.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pocktvm.errors import PockError

_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "I64": np.int64, "I32": np.int32,
    "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_, "U32": np.uint32,
}  # fmt: skip
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies in its file; `begin` counts from the file's start."""

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int


def write_tensors(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors sorted by name; the same tensors give the same bytes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    at = 0
    for name in sorted(tensors):
        array = tensors[name]
        offsets = [at, at + array.nbytes]
        kind = _NAMES[array.dtype]
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": offsets}
        at += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in sorted(tensors):
            file.write(np.ascontiguousarray(tensors[name]).data)


def read_index(path: Path) -> dict[str, Entry]:
    """What a file holds, without its data. PockError: missing, foreign or truncated."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = path.stat().st_size
            if size < 8 or length > size - 8:
                raise ValueError("truncated, or not a safetensors file")
            header = json.loads(file.read(length))
        index = {n: _entry(e, 8 + length) for n, e in header.items() if n != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PockError(f"cannot read {path}: {error}") from error
    for name, entry in index.items():
        if entry.begin + entry.dtype.itemsize * math.prod(entry.shape) > size:
            raise PockError(f"{path} is truncated: tensor '{name}' ends behind the file's end")
    return index


def read_metadata(path: Path) -> dict[str, str]:
    """The texts beside the tensors of a file that `read_index` accepts."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return dict(header.get("__metadata__") or {})


def read_tensor(path: Path, entry: Entry) -> np.ndarray:
    """One tensor of a file."""
    with path.open("rb") as file:
        file.seek(entry.begin)
        return np.fromfile(file, entry.dtype, math.prod(entry.shape)).reshape(entry.shape)


def _entry(raw: dict, data: int) -> Entry:
    return Entry(
        np.dtype(_DTYPES[raw["dtype"]]), tuple(raw["shape"]), data + raw["data_offsets"][0]
    )
