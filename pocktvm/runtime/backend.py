"""Two ways to reach an artifact's library: in this process, or behind a pipe under an emulator."""

from __future__ import annotations

import ctypes
import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pocktvm.errors import InternalError, PockError

FLOAT32, INT32, INT64, UINT8, UINT8_NHWC = range(5)
KERNEL_FAILED = 6
Batch = Sequence[tuple[np.ndarray, int]]  # arrays in C order with their pocktvm_dtype


class Backend(Protocol):
    """What a trainer needs of a library; see runtime/c/pocktvm.h."""

    def step(self, batch: Batch, lr: float) -> float:
        """The loss of one training step; shapes were checked."""

    def predict(self, batch: Batch, shape: tuple[int, ...]) -> np.ndarray:
        """The output, float32 of `shape`."""

    def get(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A copy of a tensor in the arena, by name, torch's shape."""

    def set(self, name: str, value: np.ndarray) -> None:
        """Replace a tensor in the arena."""

    def select(self, name: str, indices: np.ndarray) -> None:
        """The channels (int32, increasing) that learn of a tensor from now on."""

    def resample(self, seed: int) -> None:
        """A random choice of channels for every tensor that has one."""

    def save(self, path: str) -> None:
        """Write a checkpoint, whole or not at all."""

    def load(self, path: str) -> None:
        """Read a checkpoint; nothing changes where it does not fit."""

    def info(self) -> dict[str, int]:
        """steps, threads, rss_open_bytes."""

    def close(self) -> None:
        """Let go of the arena and the threads."""


def raise_status(status: int, message: str) -> None:
    """A library's refusal as an exception."""
    if status == KERNEL_FAILED:
        raise InternalError(message)
    if status:
        raise PockError(message)


# --- in this process ---


class _Array(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("dtype", ctypes.c_int32)]


class _View(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("kind", ctypes.c_char_p),
        ("data", ctypes.POINTER(ctypes.c_float)),
        ("ndim", ctypes.c_int32),
        ("shape", ctypes.c_int64 * 8),
        ("strides", ctypes.c_int64 * 8),
        ("size", ctypes.c_int64),
    ]


class _Options(ctypes.Structure):
    _fields_ = [
        ("weights", ctypes.c_char_p),
        ("arena", ctypes.c_void_p),
        ("arena_bytes", ctypes.c_int64),
        ("fast", ctypes.c_void_p),
        ("fast_bytes", ctypes.c_int64),
        ("threads", ctypes.c_int32),
        ("pin", ctypes.c_int32),
        ("checkpoint", ctypes.c_char_p),
        ("call_ns", ctypes.c_void_p),
        ("seed", ctypes.c_uint64),
    ]


class _Plan(ctypes.Structure):
    _fields_ = [
        ("abi", ctypes.c_int32),
        ("batch", ctypes.c_int32),
        *((name, ctypes.c_char_p) for name in "model target scheme optimizer loss".split()),
        ("fingerprint", ctypes.c_char_p),
        ("lr", ctypes.c_double),
        *((f"{n}_bytes", ctypes.c_int64) for n in "arena lower_bound total frozen fast".split()),
        ("n_inputs", ctypes.c_int32),
        ("inputs", ctypes.c_void_p),
        ("output_ndim", ctypes.c_int32),
        ("output_shape", ctypes.c_int64 * 8),
        ("output_size", ctypes.c_int64),
        ("n_tensors", ctypes.c_int32),
        ("tensor_names", ctypes.c_void_p),
        ("n_calls", ctypes.c_int32),
        ("call_labels", ctypes.c_void_p),
        ("selftest", ctypes.c_void_p),
        ("threads", ctypes.c_int32),
        ("steps", ctypes.c_int64),
        ("rss_open_bytes", ctypes.c_int64),
        ("seed", ctypes.c_uint64),
        ("n_selections", ctypes.c_int32),
    ]


class InProcess:
    """The library in this process, called through ctypes."""

    def __init__(self, library: Path, threads: int, seed: int = 0) -> None:
        try:
            self._lib = ctypes.CDLL(str(library.resolve()))
        except OSError as error:
            raise PockError(
                f"cannot load {library}: {error}\n  Build the artifact again on this machine."
            ) from error
        self._declare()
        self._handle = ctypes.c_void_p()
        weights = str(library.with_name("weights.safetensors")).encode()
        options = _Options(weights=weights, threads=threads, seed=seed)
        status = self._lib.pocktvm_open(ctypes.byref(options), ctypes.byref(self._handle))
        raise_status(status, self._error())

    def _declare(self) -> None:
        """Types, so that ctypes passes 64-bit handles and doubles as they are."""
        p, s, f = ctypes.c_void_p, ctypes.c_char_p, ctypes.POINTER(ctypes.c_float)
        arguments: dict[str, list[Any]] = {
            "open": [p, p], "close": [p], "step": [p, p, ctypes.c_double, f],
            "predict": [p, p, f], "save": [p, s], "load": [p, s], "tensor": [p, s, p],
            "select": [p, s, p, ctypes.c_int32], "resample": [p, ctypes.c_uint64],
            "plan": [p], "last_error": [p],
        }  # fmt: skip
        for name, types in arguments.items():
            getattr(self._lib, f"pocktvm_{name}").argtypes = types
        self._lib.pocktvm_close.restype = None
        self._lib.pocktvm_plan.restype = ctypes.POINTER(_Plan)
        self._lib.pocktvm_last_error.restype = s

    def _error(self) -> str:
        return self._lib.pocktvm_last_error(self._handle).decode(errors="replace")

    def _check(self, status: int) -> None:
        if status:
            raise_status(status, self._error())

    @staticmethod
    def _arrays(batch: Batch) -> ctypes.Array:
        return (_Array * max(1, len(batch)))(*[_Array(a.ctypes.data, d) for a, d in batch])

    def step(self, batch: Batch, lr: float) -> float:
        """One training step; the loss."""
        loss = ctypes.c_float()
        arrays = self._arrays(batch)
        self._check(self._lib.pocktvm_step(self._handle, arrays, lr, ctypes.byref(loss)))
        return loss.value

    def predict(self, batch: Batch, shape: tuple[int, ...]) -> np.ndarray:
        """The model's output for one batch."""
        output = np.empty(shape, np.float32)
        pointer = output.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        self._check(self._lib.pocktvm_predict(self._handle, self._arrays(batch), pointer))
        return output

    def _view(self, name: str) -> np.ndarray:
        view = _View()
        self._check(self._lib.pocktvm_tensor(self._handle, name.encode(), ctypes.byref(view)))
        flat = np.ctypeslib.as_array(view.data, (view.size,))
        shape = tuple(view.shape[: view.ndim])
        strides = tuple(4 * s for s in view.strides[: view.ndim])
        return np.lib.stride_tricks.as_strided(flat, shape, strides)

    def get(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A copy of a tensor in torch's layout."""
        return np.array(self._view(name), order="C", copy=True)

    def set(self, name: str, value: np.ndarray) -> None:
        """Overwrite a tensor, given in torch's layout."""
        self._view(name)[...] = value

    def select(self, name: str, indices: np.ndarray) -> None:
        """Let these indices of a tensor learn; int32."""
        data, count = indices.ctypes.data, len(indices)
        self._check(self._lib.pocktvm_select(self._handle, name.encode(), data, count))

    def resample(self, seed: int) -> None:
        """Draw every selection anew."""
        self._check(self._lib.pocktvm_resample(self._handle, seed))

    def save(self, path: str) -> None:
        """Write a checkpoint."""
        self._check(self._lib.pocktvm_save(self._handle, path.encode()))

    def load(self, path: str) -> None:
        """Read a checkpoint."""
        self._check(self._lib.pocktvm_load(self._handle, path.encode()))

    def info(self) -> dict[str, int]:
        """steps, threads, rss_open_bytes."""
        plan = self._lib.pocktvm_plan(self._handle).contents
        return {k: getattr(plan, k) for k in ("steps", "threads", "rss_open_bytes")}

    def close(self) -> None:
        """Give the arena and the threads back."""
        if self._handle:
            self._lib.pocktvm_close(self._handle)
            self._handle = ctypes.c_void_p()


# --- behind a pipe ---


class Piped:
    """`pocktvm-run --serve` as a child; the protocol is described in runtime/c/serve.c."""

    def __init__(self, command: Sequence[str], threads: int, seed: int = 0) -> None:
        # the child ends when our end of its stdin closes, however this process ends
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the child)
        extra = ["--threads", str(threads)] if threads else []
        extra += ["--seed", str(seed)] if seed else []
        try:
            self._child = subprocess.Popen(
                [*command, "--serve", *extra],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
            )
        except OSError as error:
            raise PockError(f"cannot start {' '.join(command)}: {error.strerror}") from error
        try:
            self._answer()
        except (PockError, InternalError):
            self.close()
            raise

    def _ask(self, line: str, batch: Batch = ()) -> bytes:
        pipe = self._child.stdin
        assert pipe is not None
        if "\n" in line:
            raise PockError("a name or a path must not contain a line break")
        try:
            pipe.write(line.encode() + b"\n")
            for array, _ in batch:
                pipe.write(np.ascontiguousarray(array).data)
            pipe.flush()
        except (BrokenPipeError, ValueError) as error:
            raise self._died() from error
        return self._answer()

    def _answer(self) -> bytes:
        pipe = self._child.stdout
        assert pipe is not None
        words = pipe.readline().split()
        known = words[:1] in ([b"ok"], [b"error"])
        if not known:
            raise self._died()
        data = pipe.read(int(words[-1]))
        if len(data) != int(words[-1]):
            raise self._died()
        if words[0] == b"error":
            raise_status(int(words[1]), data.decode(errors="replace"))
        return data

    def _died(self) -> PockError:
        code = self._child.wait()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip()[-2000:]
        return PockError(f"the trainer process ended (exit code {code}): {said or 'no message'}")

    @staticmethod
    def _dtypes(batch: Batch) -> str:
        return " ".join(str(dtype) for _, dtype in batch)

    def step(self, batch: Batch, lr: float) -> float:
        """One training step; the loss."""
        answer = self._ask(f"step {float(lr)!r} {self._dtypes(batch)}", batch)
        return float(np.frombuffer(answer, np.float32)[0])

    def predict(self, batch: Batch, shape: tuple[int, ...]) -> np.ndarray:
        """The model's output for one batch."""
        answer = self._ask(f"predict {self._dtypes(batch)}", batch)
        return np.frombuffer(answer, np.float32).reshape(shape).copy()

    def get(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A copy of a tensor in torch's layout."""
        return np.frombuffer(self._ask(f"get {name}"), np.float32).reshape(shape).copy()

    def set(self, name: str, value: np.ndarray) -> None:
        """Overwrite a tensor, given in torch's layout."""
        self._ask(f"set {name}", [(value, FLOAT32)])

    def select(self, name: str, indices: np.ndarray) -> None:
        """Let these indices of a tensor learn; int32."""
        self._ask(f"select {len(indices)} {name}", [(indices, INT32)])

    def resample(self, seed: int) -> None:
        """Draw every selection anew."""
        self._ask(f"resample {seed}")

    def save(self, path: str) -> None:
        """Write a checkpoint."""
        self._ask(f"save {path}")

    def load(self, path: str) -> None:
        """Read a checkpoint."""
        self._ask(f"load {path}")

    def info(self) -> dict[str, int]:
        """steps, threads, rss_open_bytes."""
        return json.loads(self._ask("info"))

    def close(self) -> None:
        """End the child and wait for it."""
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue  # it ended first
        self._child.wait()
        self._errors.close()
