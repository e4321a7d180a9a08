"""Trains an artifact from Python; imports numpy and neither torch nor TVM.

An artifact for this machine is loaded into this process; one for another machine runs under its
target's emulator, behind a pipe, with the same methods and the same numbers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from pocktvm.errors import PockError
from pocktvm.ir.model import Input
from pocktvm.manifest import check_files, emulator_of, manifest_inputs, read_manifest, runs_here
from pocktvm.runtime.backend import (
    FLOAT32,
    INT32,
    INT64,
    UINT8,
    UINT8_NHWC,
    Backend,
    Batch,
    InProcess,
    Piped,
)
from pocktvm.runtime.merge import merge_adapters
from pocktvm.runtime.tensor_file import read_index, read_tensor


@dataclass(frozen=True)
class Plan:
    """The memory plan, in bytes; the words are those of docs/memory.md."""

    arena_bytes: int
    lower_bound_bytes: int
    total_bytes: int
    by_class: Mapping[str, int]


def load(path: str | Path, threads: int | None = None, seed: int = 0) -> Trainer:
    """Open an artifact folder.

    threads  None: as many as the artifact was built for, at most the cores that are online
    seed     of dropout's masks, 0 to 2**63 - 1; a checkpoint that is loaded brings its own

    PockError: no artifact, damaged files, another machine's artifact without its emulator.
    """
    return Trainer(path, threads, seed)


class Trainer:
    """A model that learns: its weights, optimizer state and step count live in one arena.

    plan     bytes, see Plan
    updated  torch name -> share of the tensor that learns
    inputs   what `step` takes, labels last
    """

    def __init__(self, path: str | Path, threads: int | None = None, seed: int = 0) -> None:
        self.path = Path(path)
        if threads is not None and threads < 1:
            raise PockError(f"threads = {threads}; give 1 or more, or None for all")
        if not 0 <= seed < 2**63:
            raise PockError(f"seed = {seed}; give an integer from 0 to 2**63 - 1")
        self._manifest = read_manifest(self.path)
        check_files(self.path, self._manifest)
        plan = self._manifest["plan"]
        self.plan = Plan(
            plan["arena_bytes"], plan["lower_bound_bytes"], plan["total_bytes"], plan["by_class"]
        )
        self.updated: dict[str, float] = dict(self._manifest["updated"])
        self.inputs: list[Input] = manifest_inputs(self._manifest)
        labels = {entry["name"] for entry in self._manifest["inputs"] if entry.get("label")}
        self._x = [i for i in self.inputs if i.name not in labels]
        self._output_shape = tuple(self._manifest["output_shape"])
        self.emulated = not runs_here(self._manifest)
        self._backend: Backend | None = self._open(threads or 0, int(seed))

    def _open(self, threads: int, seed: int) -> Backend:
        if not self.emulated:
            return InProcess(self.path / self._manifest["library"], threads, seed)
        emulator = emulator_of(self._manifest)
        if not emulator:
            raise PockError(
                f"this artifact is for {self._manifest['target']} and no emulator is known for "
                "it.\n  Copy the folder to the device and run ./pocktvm-run . there."
            )
        command = [*emulator, str(self.path / "pocktvm-run"), str(self.path)]
        return Piped(command, threads, seed)

    def _live(self) -> Backend:
        if self._backend is None:
            raise PockError("this trainer is closed; load the artifact again")
        return self._backend

    def step(self, *arrays: Any, lr: float | None = None) -> float:
        """Train on one batch: `step(x, y)`, several inputs in order, labels last; the loss.

        `lr`: None takes the one stored at build. Integers may be int32 or int64; a uint8 image
        batch is normalised on the device. PockError: wrong number, shape, dtype, NaN, a label out
        of range; the weights are then as before.
        """
        rate = self._manifest["lr"] if lr is None else float(lr)
        if not np.isfinite(rate) or rate < 0:
            raise PockError(f"lr = {lr}; give a finite number, 0 or more")
        return self._live().step(self._batch(arrays, self.inputs, "step"), rate)

    def predict(self, *arrays: Any) -> np.ndarray:
        """The model's output on one batch, float32, with the weights as they are now.

        Takes what `step` takes, without labels: a whole batch of the shapes in `inputs`. PockError:
        wrong number, shape or dtype, NaN, an id out of range.
        """
        return self._live().predict(self._batch(arrays, self._x, "predict"), self._output_shape)

    def state_dict(self, merged: bool = True) -> dict[str, np.ndarray]:
        """Every parameter by torch's name (tied names too), in torch's shape and layout.

        Adapters (LoRA) are merged into the weights they adapt, so that the module that takes them
        computes what was trained; with `merged=False` they stand beside them, as `<layer>.lora_A`
        and `<layer>.lora_B`.
        """
        backend = self._live()
        weights = self.path / "weights.safetensors"
        trained = {n for n, t in self._manifest["tensors"].items() if t["kind"] == "trained"}
        state = {}
        for name, entry in read_index(weights).items():
            if name in trained:
                state[name] = backend.get(name, entry.shape)
            else:
                state[name] = read_tensor(weights, entry)
        aliases = {n: t["aliases"] for n, t in self._manifest["tensors"].items() if n in trained}
        for name, others in {**self._manifest["aliases"], **aliases}.items():
            state.update({other: state[name] for other in others if name in state})
        return merge_adapters(state, self._manifest.get("adapters") or {}) if merged else state

    def adapters(self) -> dict[str, np.ndarray]:
        """LoRA's matrices alone, as `<layer>.lora_A` and `<layer>.lora_B`."""
        entries = (self._manifest.get("adapters") or {}).values()
        names = {entry[side] for entry in entries for side in ("a", "b")}
        return {n: a for n, a in self.state_dict(merged=False).items() if n in names}

    def optimizer_state(self) -> dict[str, np.ndarray]:
        """The optimizer's tensors as `<state>/<parameter>`, shaped like what learns of it."""
        tensors = self._manifest["tensors"].items()
        states = {n: tuple(t["shape"]) for n, t in tensors if t["kind"] == "optimizer"}
        return {name: self._live().get(name, shape) for name, shape in states.items()}

    @property
    def selection(self) -> dict[str, list[int]]:
        """Tensor -> its channels that learn now, of an artifact built with `resample`."""
        live = self._live()
        return {
            entry["of"]: live.get(name, tuple(entry["shape"])).view(np.int32).tolist()
            for name, entry in self._selections().items()
        }

    def select(self, channels: Mapping[str, Sequence[int]]) -> None:
        """Let other channels learn from the next step on: tensor -> as many indices as before.

        What channels have learned stays. Optimizer state stays with the channels that go on, and
        starts anew for the others. PockError: the artifact was not built with `resample`, or names,
        counts or indices do not fit; nothing has changed then.
        """
        backend = self._live()
        entries = self._selections()
        if not entries:
            raise PockError(
                "the channels that learn are fixed in this artifact; build it with --resample "
                "(resample=True) to choose them."
            )
        known = self._names_of_selections(entries)
        checked = {n: _indices(n, v, known.get(n), sorted(known)) for n, v in channels.items()}
        if len({known[n]["of"] for n in checked}) < len(checked):
            raise PockError("select: a tensor is given twice, by two of its names")
        for name, indices in checked.items():
            backend.select(name, indices)

    def resample(self, seed: int) -> None:
        """`select` as many random channels of every such tensor; they follow from the seed alone
        (0 to 2**63 - 1). A checkpoint holds what was chosen.

        PockError: the seed, or an artifact that was not built with `resample`.
        """
        if not 0 <= int(seed) < 2**63:
            raise PockError(f"seed = {seed}; give an integer from 0 to 2**63 - 1")
        self._live().resample(int(seed))

    def _selections(self) -> dict[str, dict[str, Any]]:
        tensors = self._manifest["tensors"].items()
        return {name: entry for name, entry in tensors if entry["kind"] == "selection"}

    def _names_of_selections(
        self, entries: Mapping[str, dict[str, Any]]
    ) -> dict[str, dict[str, Any]]:
        tensors = self._manifest["tensors"]
        return {
            name: entry
            for entry in entries.values()
            for name in (entry["of"], *tensors[entry["of"]]["aliases"])
        }

    def save(self, path: str | Path) -> None:
        """Trained tensors, optimizer state and step count as safetensors, replaced atomically."""
        self._live().save(os.path.abspath(path))

    def load(self, path: str | Path) -> None:
        """Go on from a checkpoint. PockError: it is foreign, damaged or of another model; the
        state is then as before."""
        self._live().load(os.path.abspath(path))

    @property
    def loss(self) -> str:
        """The loss it was built with, as text with its options."""
        return str(self._manifest["loss"])

    @property
    def steps(self) -> int:
        """Steps done since the initial weights, those before a loaded checkpoint included."""
        return int(self._live().info()["steps"])

    @property
    def threads(self) -> int:
        """Threads that a step uses."""
        return int(self._live().info()["threads"])

    def close(self) -> None:
        """Give memory and threads back; the trainer is of no use afterwards."""
        if self._backend is not None:
            self._backend.close()
            self._backend = None

    def __enter__(self) -> Trainer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_backend", None) is not None:
            self.close()

    def _batch(self, arrays: Sequence[Any], specs: Sequence[Input], what: str) -> Batch:
        if len(arrays) == 1 and isinstance(arrays[0], (tuple, list)) and len(specs) != 1:
            arrays = arrays[0]  # predict((x1, x2))
        elif len(arrays) == 2 and isinstance(arrays[0], (tuple, list)) and len(specs) > 2:
            arrays = [*arrays[0], arrays[1]]  # step((x1, x2), y)
        if len(arrays) != len(specs):
            names = ", ".join(s.name for s in specs)
            raise PockError(f"{what} takes {len(specs)} arrays ({names}), not {len(arrays)}")
        return [_convert(a, s, what) for a, s in zip(arrays, specs, strict=True)]


def _convert(value: Any, spec: Input, what: str) -> tuple[np.ndarray, int]:
    """A C-contiguous array in a dtype the library reads; values are checked there."""
    array = np.asarray(value)
    kind = str(array.dtype)
    last = kind == "uint8" and len(spec.shape) == 4 and array.shape == _channels_last(spec.shape)
    if array.shape != spec.shape and not last:
        raise PockError(
            f"{what}: '{spec.name}' has shape {array.shape}, this artifact takes {spec.shape}"
            + _batch_hint(array.shape, spec.shape)
        )
    known = {"float32": FLOAT32, "uint8": UINT8} if spec.dtype == "float32" else {}
    known = known or {"int32": INT32, "int64": INT64}
    if kind not in known:
        raise PockError(
            f"{what}: '{spec.name}' is {kind}, this artifact takes {' or '.join(known)}; "
            f"convert it with .astype(np.{spec.dtype})"
        )
    dtype = UINT8_NHWC if last and array.shape != spec.shape else known[kind]
    return np.ascontiguousarray(array), dtype


def _indices(
    name: str, value: Sequence[int], entry: Mapping[str, Any] | None, names: Sequence[str]
) -> np.ndarray:
    """A selection as the library takes it."""
    if entry is None:
        more = ", …" if len(names) > 6 else ""
        raise PockError(
            f"select: '{name}' has no channels to choose in this artifact.\n"
            f"  It has for: {', '.join(names[:6])}{more}."
        )
    array = np.asarray(value)
    count, extent = entry["shape"][0], entry["extent"]
    whole = array.dtype.kind in "iu" and array.ndim == 1
    if not whole or len(array) != count or len(np.unique(array)) != count:
        given = f"{len(np.unique(array))} given" if whole else f"not {value!r}"
        raise PockError(f"select: '{name}' takes {count} different channel indices; {given}.")
    wrong = [int(i) for i in array if not 0 <= i < extent]
    if wrong:
        raise PockError(
            f"select: '{name}' has {extent} channels, numbered from 0; there is no {wrong[0]}."
        )
    return np.ascontiguousarray(array, np.int32)


def _channels_last(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0], shape[2], shape[3], shape[1])


def _batch_hint(given: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    if wanted and given[1:] == wanted[1:]:
        return f"\n  The batch is fixed at build: give {wanted[0]} samples, or build with another."
    return ""
