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
from pocktvm.reference import evaluate

STEPS = 3


def record_self_test(
    graphs: Sequence[Graph], inputs: Sequence[Input], optimizer: Any, steps: int = STEPS
) -> SelfTest:
    """Run the first steps of training on one synthetic batch through the reference."""
    step, predict = graphs
    batch = synthetic_batch(inputs)
    lr = float(optimizer.lr)
    read = {n: batch[n] for n in predict.inputs}
    output = evaluate(predict, read, lr=lr, keep=False).outputs["output"]
    return SelfTest(batch, first_losses(step, batch, lr, steps), output, lr)


def first_losses(
    step: Graph, batch: Mapping[str, np.ndarray], lr: float, steps: int
) -> tuple[float, ...]:
    """The reference's losses of `steps` steps on one batch."""
    params: dict[str, np.ndarray] | None = None
    losses = []
    for t in range(1, steps + 1):
        result = evaluate(step, batch, params=params, lr=lr, t=t, keep=False)
        losses.append(float(result.outputs["loss"]))
        params = {**(params or {}), **result.updates}
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
