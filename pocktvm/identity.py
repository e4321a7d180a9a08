"""The facts of a build that go into its manifest and its library."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import numpy as np

from pocktvm.ir.artifact import Identity
from pocktvm.ir.kernels import Kernels
from pocktvm.ir.memory import MemoryPlan
from pocktvm.ir.model import Input, Model
from pocktvm.memory import timeline

if TYPE_CHECKING:
    from pocktvm.build import Build
    from pocktvm.levers import Trade


def label_inputs(model: Model, loss: Any) -> tuple[Input, ...]:
    """The model's inputs, then the labels if the loss has any."""
    label = loss.label_input(model.output_shape)
    return (*model.inputs.values(), *((label,) if label is not None else ()))


def identify(
    build: Build,
    model: Model,
    inputs: tuple[Input, ...],
    updated: Mapping[str, float],
    kernels: Kernels,
    plan: MemoryPlan,
    seconds: Mapping[str, float],
    trade: Trade | None,
) -> Identity:
    """Collect the identity of a build. `inputs` are the step's, labels included; `seconds` those
    of its stages so far; `trade` what a budget cost."""
    return Identity(
        model=model.name,
        target=build.target.name,
        scheme=str(build.scheme),
        loss=str(build.loss),
        optimizer=str(build.optimizer),
        lr=float(build.optimizer.lr),
        batch=inputs[0].shape[0] if inputs and inputs[0].shape else 1,
        inputs=inputs,
        output_shape=model.output_shape,
        updated={name: float(share) for name, share in updated.items()},
        state={n: np.asarray(p.value) for n, p in model.parameters.items()},
        aliases={n: p.aliases for n, p in model.parameters.items() if p.aliases},
        versions=versions(),
        extra={
            **build.facts,
            "seconds": dict(seconds),
            "threads": build.threads,
            "saved": build.saved,
            "trade": trade.facts() if trade else None,
            "notices": list(model.notices),
            "adapters": {name: asdict(adapter) for name, adapter in model.adapters.items()},
            "timeline": {n: timeline(kernels, p, plan) for n, p in kernels.programs.items()},
        },
    )


def versions() -> dict[str, str]:
    """Versions of what made the artifact."""
    names = ("pocktvm", "apache-tvm", "apache-tvm-ffi", "torch", "numpy", "ziglang")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
