"""Does a build fit its budget, and which smaller builds would?

The first answer comes from the graphs, before any kernel is compiled; the suggestions of a refusal
come from the graphs of builds that differ in one thing each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pocktvm import levers, memory
from pocktvm.autodiff.differentiate import differentiate
from pocktvm.build import Build
from pocktvm.errors import PockError
from pocktvm.ir.artifact import SelfTest
from pocktvm.ir.graph import Graph
from pocktvm.ir.kernels import Kernels
from pocktvm.ir.memory import MemoryPlan
from pocktvm.ir.scheme import Scheme
from pocktvm.passes import run_passes
from pocktvm.recorded import first_losses

SMALLER_SCHEMES = ("pockengine", "last")
Lower = Callable[[tuple[Graph, ...]], levers.Planned]


def fit(
    build: Build, graphs: tuple[Graph, ...], lower: Lower, self_test: SelfTest
) -> tuple[Kernels, MemoryPlan, levers.Trade | None]:
    """Kernels and plan of the programs within the build's limit, and what that cost (levers.py).

    `lower` compiles and plans programs. Raises PockError where no lever is long enough.
    """
    _, kernels, plan, trade = levers.fitted(
        graphs, build.limit, build.target, lower,
        lambda graphs, plan: check(build, graphs, plan),
        lambda parts: in_parts(build, parts, self_test),
        _batch(build.example_inputs) or 1,
    )  # fmt: skip
    return kernels, plan, trade


def in_parts(build: Build, count: int, self_test: SelfTest) -> Graph | None:
    """The optimised step that runs the batch in `count` parts; None where inputs cannot be cut
    or the parts do not add up to the step `self_test` was recorded from (samples that meet)."""
    inputs = _part_of_batch(build.example_inputs, count)
    if inputs is None:
        return None
    try:
        model, updated = replace(build, example_inputs=inputs).resolve()
        step, _ = differentiate(model, updated, build.loss, build.optimizer, parts_of_batch=count)
    except PockError:
        return None
    found = first_losses(step, self_test.inputs, self_test.lr, len(self_test.losses))
    if not np.allclose(found, self_test.losses, rtol=1e-4, atol=1e-6, equal_nan=True):
        return None
    return run_passes(step, build.target, saved=build.saved)


def check(build: Build, graphs: Sequence[Graph], plan: MemoryPlan | None = None) -> None:
    """PockError when the plan, or without one the estimate, exceeds the build's limit."""
    if build.limit is None:
        return
    now = memory.estimate(graphs)
    memory.check_budget(
        plan or now,
        build.limit,
        target=build.target.name,
        at_least=plan is None,
        suggestions=_smaller(build, now.total_bytes, build.limit),
    )


def _smaller(build: Build, now: int, limit: int) -> dict[str, Callable[[], int]]:
    """What the user could change -> how many bytes it saves."""

    def saves(other: Build) -> Callable[[], int]:
        return lambda: now - _estimate(other, limit).total_bytes

    found = {
        f"--scheme {name}": saves(replace(build, scheme=Scheme.parse(name), resample=False))
        for name in SMALLER_SCHEMES
        if name != str(build.scheme)
    }
    if build.saved == "float32" and not build.target.is_gpu:
        found["--saved bf16"] = saves(replace(build, saved="bf16"))
    if build.saved != "int8" and not build.target.is_gpu:
        found["--saved int8"] = saves(replace(build, saved="int8"))
    halved = _half_batch(build.example_inputs)
    if halved is not None:
        inputs, size = halved
        found[f"batch {size} -> {size // 2}"] = saves(replace(build, example_inputs=inputs))
    return found


def _estimate(build: Build, limit: int) -> MemoryPlan:
    """A build's plan shrunk to `limit`, from its graphs."""
    return memory.estimate(levers.shrunk(build.programs(), limit, build.target))


def _half_batch(example_inputs: Any) -> tuple[tuple[Any, ...], int] | None:
    """The inputs with half the samples; None where there is no common batch axis to halve."""
    size = _batch(example_inputs)
    if size is None or size < 2:
        return None
    return tuple(x[: size // 2] for x in _listed(example_inputs)), size


def _part_of_batch(example_inputs: Any, count: int) -> Any:
    """The first of `count` equal parts of the inputs, by name where they have names."""
    size = _batch(example_inputs)
    if size is None or size % count:
        return None
    if isinstance(example_inputs, Mapping):
        return {name: x[: size // count] for name, x in example_inputs.items()}
    return tuple(x[: size // count] for x in _listed(example_inputs))


def _listed(example_inputs: Any) -> list[Any]:
    if isinstance(example_inputs, Mapping):
        return list(example_inputs.values())
    return list(example_inputs) if isinstance(example_inputs, tuple | list) else [example_inputs]


def _batch(example_inputs: Any) -> int | None:
    """The common extent of the inputs' first axes."""
    sizes = {x.shape[0] if getattr(x, "ndim", 0) else 1 for x in _listed(example_inputs)}
    return int(sizes.pop()) if len(sizes) == 1 else None
