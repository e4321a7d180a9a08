"""Does the build fit its budget, and which smaller builds would?

The first answer comes from the graphs, before any kernel is compiled; the suggestions of a refusal
come from the graphs of builds that differ in one thing each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pocktvm import memory
from pocktvm.autodiff.differentiate import differentiate
from pocktvm.data import check_data
from pocktvm.errors import PockError
from pocktvm.frontend.lora import add_adapters
from pocktvm.frontend.source import import_model
from pocktvm.identity import label_inputs
from pocktvm.ir.artifact import SelfTest
from pocktvm.ir.graph import Graph
from pocktvm.ir.memory import MemoryPlan
from pocktvm.ir.model import Model
from pocktvm.ir.part import selectable
from pocktvm.ir.scheme import Scheme
from pocktvm.ir.target import Target
from pocktvm.levers import shrunk
from pocktvm.passes import run_passes
from pocktvm.recorded import first_losses
from pocktvm.search.activity import measure_activity

SMALLER_SCHEMES = ("pockengine", "last")


@dataclass(frozen=True)
class Build:
    """Everything that decides the graphs of a build. `options` are import_model's; `samples` are
    arrays by input name, for schemes that ask for data; with `resample` the trainer may choose
    other channels for the parts that learn."""

    module: Any
    example_inputs: Any
    scheme: Scheme
    loss: Any
    optimizer: Any
    target: Target
    options: Mapping[str, Any] = field(default_factory=dict)
    samples: Mapping[str, Any] | None = None
    resample: bool = False

    def resolve(self) -> tuple[Model, dict[str, float]]:
        """The model with the scheme's adapters, and what learns of it."""
        model = import_model(self.module, self.example_inputs, **self.options)
        model = add_adapters(model, self.scheme)
        activity = None
        if self.scheme.needs_data and self.samples is not None:
            specs = label_inputs(model, self.loss)
            arrays = check_data(self.samples, specs, labels_optional=True)
            activity = measure_activity(model, arrays)
        updated = self.scheme.resolve(model, activity)
        return model, selectable(model, updated) if self.resample else updated

    def estimate(self, limit: int) -> MemoryPlan:
        """Import, differentiate, optimise and shrink to `limit`, up to the kernels."""
        model, updated = self.resolve()
        graphs = differentiate(model, updated, self.loss, self.optimizer)
        optimised = [run_passes(g, self.target) for g in graphs]
        return memory.estimate(shrunk(optimised, limit, self.target))

    def in_parts(self, count: int, self_test: SelfTest) -> Graph | None:
        """The optimised step that runs the batch in `count` parts; None where inputs cannot be cut
        or the parts do not add up to the step `self_test` was recorded from (samples that meet)."""
        inputs = _part_of_batch(self.example_inputs, count)
        if inputs is None:
            return None
        try:
            model, updated = replace(self, example_inputs=inputs).resolve()
            step, _ = differentiate(
                model, updated, self.loss, self.optimizer, parts_of_batch=count
            )
        except PockError:
            return None
        found = first_losses(step, self_test.inputs, self_test.lr, len(self_test.losses))
        if not np.allclose(found, self_test.losses, rtol=1e-4, atol=1e-6, equal_nan=True):
            return None
        return run_passes(step, self.target)

    def batch(self) -> int:
        """Samples of a step; 1 where inputs have no common first axis."""
        return _batch(self.example_inputs) or 1

    def check(
        self, graphs: Sequence[Graph], plan: MemoryPlan | None = None, *, limit: int | None
    ) -> None:
        """PockError when the plan, or without one the estimate, exceeds `limit`."""
        if limit is None:
            return
        now = memory.estimate(graphs)
        memory.check_budget(
            plan or now,
            limit,
            target=self.target.name,
            at_least=plan is None,
            suggestions=self._smaller(now.total_bytes, limit),
        )

    def _smaller(self, now: int, limit: int) -> dict[str, Callable[[], int]]:
        """What the user could change -> how many bytes it saves."""

        def saves(build: Build) -> Callable[[], int]:
            return lambda: now - build.estimate(limit).total_bytes

        found = {
            f"--scheme {name}": saves(replace(self, scheme=Scheme.parse(name), resample=False))
            for name in SMALLER_SCHEMES
            if name != str(self.scheme)
        }
        halved = _half_batch(self.example_inputs)
        if halved is not None:
            inputs, size = halved
            found[f"batch {size} -> {size // 2}"] = saves(replace(self, example_inputs=inputs))
        return found


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
