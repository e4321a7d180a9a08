"""The self-test a build records: a batch, and the losses an independent interpreter gets on it.

The numbers come from the unfused, unoptimised graph evaluated by torch's operators
(pocktvm/reference), never from our own kernels: a wrong compiler is found on the device, before
it touches a user's weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pocktvm.ir.artifact import SelfTest
from pocktvm.ir.graph import Graph
from pocktvm.ir.model import Input
from pocktvm.passes.narrow_saved import narrow_saved
from pocktvm.reference import evaluate

STEPS = 3
# The runner allows 1e-4; a fifth of it is left to what rounding alone may do.
STEADY = 2e-5
LOWER = (1.0, 0.1, 0.01, 0.001)  # rates that are tried, as factors of the optimizer's


def record_self_test(
    graphs: Sequence[Graph],
    inputs: Sequence[Input],
    optimizer: Any,
    steps: int = STEPS,
    saved: str = "float32",
) -> SelfTest:
    """Run the first steps of training on one synthetic batch through the reference.

    Where an update is so large that rounding decides on which side of a ReLU a unit lands, two
    correct programs part within a step. The recorded rate is the first of `LOWER` at which the
    reference agrees with itself, started from weights that are off by their last bit.

    Losses are float32's also where activations are `saved` narrow: the rate must then be one
    at which their rounding, too, moves the reference's losses by no more.
    """
    step, predict = graphs
    batch = synthetic_batch(inputs)
    read = {n: batch[n] for n in predict.inputs}
    base = float(optimizer.lr)
    output = evaluate(predict, read, lr=base, keep=False).outputs["output"]
    nearby = last_bits_off(step)
    rounded = narrow_saved(step, saved) if saved != "float32" else None
    for factor in LOWER:
        lr = base * factor
        losses = first_losses(step, batch, lr, steps)
        if spread(losses, first_losses(step, batch, lr, steps, nearby)) > STEADY:
            continue
        if rounded is None or spread(losses, first_losses(rounded, batch, lr, steps)) <= STEADY:
            break
    return SelfTest(batch, losses, output, lr)


def last_bits_off(step: Graph, seed: int = 0) -> dict[str, np.ndarray]:
    """Every parameter with each value moved by half a unit in the last place, up or down."""
    rng, found = np.random.default_rng(seed), {}
    for name, param in step.params.items():
        if param.value.dtype == np.float32:
            sign = rng.integers(0, 2, param.value.shape, dtype=np.int8) * 2 - 1
            found[name] = (param.value * (1 + sign * 2.0**-23)).astype(np.float32)
    return found


def spread(losses: Sequence[float], others: Sequence[float]) -> float:
    """The largest difference, relative to max(|loss|, 0.01), as the self-test's own."""
    pairs = zip(losses, others, strict=True)
    return max(abs(a - b) / max(abs(a), 0.01) for a, b in pairs)


def first_losses(
    step: Graph,
    batch: Mapping[str, np.ndarray],
    lr: float,
    steps: int,
    start: Mapping[str, np.ndarray] | None = None,
) -> tuple[float, ...]:
    """The reference's losses of `steps` steps on one batch; `start` replaces parameters."""
    params: Mapping[str, np.ndarray] = start or {}
    losses = []
    for t in range(1, steps + 1):
        result = evaluate(step, batch, params=params, lr=lr, t=t, keep=False)
        losses.append(float(result.outputs["loss"]))
        params = {**params, **result.updates}
    return tuple(losses)


def synthetic_batch(inputs: Sequence[Input], seed: int = 0) -> dict[str, np.ndarray]:
    """Standard normal floats and uniform integers within each input's bound."""
    rng = np.random.default_rng(seed)
    batch = {}
    for spec in inputs:
        if spec.dtype == "float32":
            batch[spec.name] = rng.standard_normal(spec.shape).astype(np.float32)
        else:
            bound = spec.bound or 2
            batch[spec.name] = rng.integers(0, bound, spec.shape).astype(spec.dtype)
    return batch
