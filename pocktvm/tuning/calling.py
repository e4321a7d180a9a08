"""Calls a linked candidate on seeded inputs: in the local worker, or on a board over RPC."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pocktvm.schedule.pack import apply_pack
from pocktvm.tuning.candidate import SYMBOL

TOLERANCE = 1e-3  # of the largest output: other summation orders pass, wrong kernels do not


def seeded_arguments(description: dict[str, Any]) -> list[np.ndarray]:
    """Inputs from one seed (small integers index safely), zeroed outputs and workspaces."""
    rng = np.random.default_rng(0)
    arrays = []
    for index, (shape, dtype) in enumerate(description["args"]):
        if index >= description["n_inputs"]:
            arrays.append(np.zeros(shape, dtype))
            continue
        logical = description["shapes"][index]
        if dtype == "float32":
            array = rng.uniform(0.5, 1.5, logical).astype(np.float32)
        else:
            array = rng.integers(0, 2, logical).astype(dtype)
        pack = description["pack"].get(str(index))
        if pack is not None:
            array = apply_pack(pack[0], array, pack[1])
        arrays.append(np.ascontiguousarray(array).reshape(shape))
    return arrays


def prepare(
    library: Any, description: Path, tensor: Callable[[np.ndarray], Any]
) -> tuple[Callable[[], None], list[Any]]:
    """(call, outputs): a call of the candidate without arguments, and its output tensors."""
    facts = json.loads(description.read_text())
    tensors = [tensor(a) for a in seeded_arguments(facts)]
    function = library[SYMBOL]
    first, count = facts["n_inputs"], facts["n_outputs"]
    return lambda: function(*tensors), tensors[first : first + count]


def time_call(call: Callable[[], None], budget_seconds: float = 0.15) -> list[float]:
    """Seconds of single calls: warmed up, at least 5, about `budget_seconds` in all."""
    call()
    start = time.perf_counter()
    call()
    once = max(time.perf_counter() - start, 1e-7)
    inner = max(1, int(2e-4 / once))
    times: list[float] = []
    end = time.perf_counter() + budget_seconds
    while len(times) < 5 or (time.perf_counter() < end and len(times) < 200):
        start = time.perf_counter()
        for _ in range(inner):
            call()
        times.append((time.perf_counter() - start) / inner)
    return times


def check_equal(got: np.ndarray, want: np.ndarray) -> None:
    """Raise ValueError where a candidate computes something else than the default."""
    got, want = got.astype(np.float64).ravel(), want.astype(np.float64).ravel()
    scale = max(1e-6, float(np.abs(want).max(initial=0.0)))
    if not np.abs(got - want).max(initial=0.0) <= TOLERANCE * scale:
        raise ValueError("wrong result")
