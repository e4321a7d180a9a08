"""POCKTVM_CHECK=1: a pass must keep what the reference computes."""

from __future__ import annotations

import os

import numpy as np

from pocktvm.errors import InternalError
from pocktvm.ir.graph import Graph
from pocktvm.reference import evaluate

RELATIVE = 2e-3  # of the largest magnitude: folded scales round differently
# of the pass that rounds saved activations, to bfloat16's eight bits or to a byte
ROUNDED = {"bf16": 3e-2, "int8": 6e-2}


def checking() -> bool:
    """True when the environment asks for the comparison."""
    return os.environ.get("POCKTVM_CHECK", "") not in ("", "0")


def random_inputs(graph: Graph, seed: int = 0) -> dict[str, np.ndarray]:
    """Arrays for the run-time inputs; integers are 0 or 1, which any table or class axis holds."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for name in graph.inputs:
        value = graph.values[name]
        if value.dtype == "float32":
            arrays[name] = rng.standard_normal(value.shape).astype(np.float32)
        else:
            arrays[name] = rng.integers(0, 2, value.shape).astype(value.dtype)
    return arrays


def compare(before: Graph, after: Graph, name: str, rounds: str = "") -> None:
    """Raise InternalError when outputs or updated parameters differ, by more than rounding to what
    a pass `rounds` saved activations to may make them."""
    inputs = random_inputs(before)
    old, new = evaluate(before, inputs), evaluate(after, inputs)
    pairs = {k: (v, new.outputs[k]) for k, v in old.outputs.items()}
    for param, array in old.updates.items():
        after_array = new.updates.get(param, after.params[param].value)
        pairs[param] = (
            before.params[param].in_torch(array),
            after.params[param].in_torch(after_array),
        )
    for key, (a, b) in pairs.items():
        scale = float(np.max(np.abs(a), initial=1e-6))
        error = float(np.max(np.abs(a.astype(np.float64) - b), initial=0.0)) / scale
        if a.shape != b.shape or not error <= ROUNDED.get(rounds, RELATIVE):
            raise InternalError(
                f"pass '{name}' changes '{key}' of {before.name}: relative error {error:.2e}"
            )
