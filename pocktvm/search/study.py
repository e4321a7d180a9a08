"""What a search is of: a build in which everything may learn, its samples, how to analyse it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pocktvm.build import Build
from pocktvm.data import check_data
from pocktvm.errors import PockError
from pocktvm.identity import label_inputs
from pocktvm.ir.model import Model
from pocktvm.search.candidates import SHARES, Candidates
from pocktvm.search.table import digest

PROTOCOL = 4  # of the trials: tables of another one are not gone on with
UNSTAMPED = ("shares", "minutes", "threads")  # settings that another run may change


@dataclass(frozen=True)
class Settings:
    """How to analyse. `minutes` is for all trials together, on this machine, with `threads` (None:
    all there are)."""

    method: str = "finetune"
    minutes: float = 10.0
    seed: int = 0
    shares: tuple[float, ...] = SHARES
    only: tuple[str, ...] = ()
    threads: int | None = None


@dataclass(frozen=True)
class Study:
    """`build` trains in full and `model` is its model; `arrays` are the checked samples; the table
    lies at `path`, the artifact of the trials beside it until the search is done."""

    build: Build
    model: Model
    candidates: Candidates
    settings: Settings
    arrays: Mapping[str, Any]
    path: Path = Path()

    @property
    def folder(self) -> Path:
        """Where the artifact of the trials lies."""
        return self.path.with_name(self.path.name + ".artifact")

    def facts(self) -> dict[str, Any]:
        """What the analysis is of; another one's table is not gone on with."""
        chosen = {k: v for k, v in asdict(self.settings).items() if k not in UNSTAMPED}
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in chosen.items()}
        found = model_facts(self.build, self.model)
        return {**found, "data": digest(self.arrays), "protocol": PROTOCOL, **plain}

    def stamp(self) -> dict[str, Any]:
        """What the artifact of the trials depends on."""
        return {**model_facts(self.build, self.model), "method": self.settings.method}

    def forget(self) -> None:
        """Remove the artifact of the trials: the table is all that stays."""
        shutil.rmtree(self.folder, ignore_errors=True)


def model_facts(build: Build, model: Model) -> dict[str, Any]:
    """What of a build an analysis depends on, whatever the data."""
    return {
        "model": model.name,
        "parameters": digest({n: p.value for n, p in model.parameters.items()}),
        "inputs": {n: list(i.shape) for n, i in model.inputs.items()},
        "loss": str(build.loss),
        "optimizer": str(build.optimizer),
        "lr": float(build.optimizer.lr),
    }


def checked_samples(build: Build, model: Model, samples: Mapping[str, Any]) -> dict[str, Any]:
    """The samples as the model reads them; PockError for what no analysis can be made of."""
    arrays = check_data(samples, label_inputs(model, build.loss))
    batch = next(iter(model.inputs.values())).shape[0]
    count = len(next(iter(arrays.values())))
    if count < 2 * batch:
        raise PockError(
            f"the data has {count} samples; an analysis trains on some and judges on others, one "
            f"batch of {batch} each at least.\n  Give more samples, or a smaller --batch."
        )
    if str(build.loss).startswith("cross_entropy"):
        labels = np.unique(np.asarray(arrays[list(arrays)[-1]]))
        if len(labels) < 2:
            raise PockError(
                f"every label of the data is {labels[0]}: with one class there is nothing to learn "
                "by.\n  Give samples of two classes or more."
            )
    return arrays
