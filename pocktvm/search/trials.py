"""The artifact of all trials: everything may learn, at rates that are an input of its step."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pocktvm.autodiff.differentiate import differentiate
from pocktvm.autodiff.optimizers import SGD, Optimizer
from pocktvm.build import Progress
from pocktvm.ir.rates import Rates
from pocktvm.ir.scheme import Scheme
from pocktvm.passes import run_passes
from pocktvm.runtime.trainer import Trainer, load
from pocktvm.search.bench import Bench
from pocktvm.search.planner import cost_of, count_kernels
from pocktvm.search.study import Study
from pocktvm.targets import load_target

HELD_OUT = 1024  # samples; trials are judged by the first of them


@contextlib.contextmanager
def opened(
    study: Study, progress: Progress | None = None
) -> Iterator[tuple[Bench, dict[str, Any]]]:
    """The study's artifact with its data, ready for trials, and what was measured of it."""
    optimizer, scheme = _optimizer(study), _everything(study)
    rates = Rates.of(study.model, scheme.resolve(study.model))
    _compile(study, scheme, optimizer, progress)
    trainer = load(study.folder, study.settings.threads)
    with tempfile.TemporaryDirectory(prefix="pocktvm-analysis-") as work, trainer:
        bench = Bench(
            trainer, rates, study.arrays, str(study.build.loss),
            lr=float(study.build.optimizer.lr), seed=study.settings.seed,
            held_out=_held_out(study, trainer), work=Path(work),
        )  # fmt: skip
        yield bench, _measured(study, scheme, optimizer, rates, trainer)


def _everything(study: Study) -> Scheme:
    """The classifier, every bias and every weight there is to try."""
    candidates = study.candidates
    names = {**candidates.head, **candidates.biases(candidates.depths[-1])}
    return Scheme(dict.fromkeys([*names, *candidates.weights], 1), name="analysis")


def _optimizer(study: Study) -> Optimizer:
    """The build's; where gradients are read, one whose step is the gradient."""
    own = study.build.optimizer
    return own if study.settings.method == "finetune" else SGD(lr=own.lr)


def _compile(study: Study, scheme: Scheme, optimizer: Optimizer, progress: Progress | None) -> None:
    """Make the artifact, unless a run that was stopped left it."""
    from pocktvm import compiler
    from pocktvm.manifest import MANIFEST, damaged_files, read_manifest

    folder, stamp = study.folder, study.stamp()
    whole = (folder / MANIFEST).is_file() and not damaged_files(folder, read_manifest(folder))
    if whole and read_manifest(folder).get("analysis") == stamp:
        return
    trial = replace(
        study.build, scheme=scheme, optimizer=optimizer, target=load_target("host"), limit=None,
        resample=False, rates=True, facts={"analysis": stamp},
    )  # fmt: skip
    compiler.compile(trial, folder, progress)


def _held_out(study: Study, trainer: Trainer) -> int:
    """How many samples judge a trial: whole batches, a quarter of all at most."""
    batch, count = trainer.inputs[0].shape[0], len(next(iter(study.arrays.values())))
    return max(batch, min(HELD_OUT, count // 4) // batch * batch)


def _measured(
    study: Study, scheme: Scheme, optimizer: Optimizer, rates: Rates, trainer: Trainer
) -> dict[str, Any]:
    """The modelled work of training everything, and the mean bytes of a kernel's code."""
    updated = scheme.resolve(study.model)
    step, _ = differentiate(study.model, updated, study.build.loss, optimizer, rates)
    step = run_passes(step, study.build.target)
    plan = trainer.plan
    code = plan.total_bytes - plan.arena_bytes - plan.by_class.get("frozen", 0)
    work = cost_of(step, load_target("host")).work
    return {"full_work": work, "kernel_bytes": code / count_kernels(step)}
