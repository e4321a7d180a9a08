"""Contribution analysis: what does each candidate add to training the classifier alone?

One artifact is compiled in which everything may learn, at rates that are an input of its step;
every trial is that artifact with other rates. `finetune` trains each candidate briefly and measures
the held-out loss; `fisher` and `grad-norm` read the gradients of some batches instead.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pocktvm.autodiff.differentiate import differentiate
from pocktvm.autodiff.optimizers import SGD
from pocktvm.build import Build, Progress
from pocktvm.data import check_data
from pocktvm.errors import PockError
from pocktvm.identity import label_inputs
from pocktvm.ir.model import Model
from pocktvm.ir.part import Part
from pocktvm.ir.rates import Rates
from pocktvm.ir.scheme import Scheme
from pocktvm.passes import run_passes
from pocktvm.search.bench import Bench
from pocktvm.search.candidates import SHARES, Candidates, Key
from pocktvm.search.finals import rounds_worth
from pocktvm.search.planner import cost_of, count_kernels
from pocktvm.search.table import Row, Table, digest
from pocktvm.targets import load_target

METHODS = ("finetune", "fisher", "grad-norm")
STEPS = (8, 60)  # of a trial, at least and at most
WARM_UP_STEPS = (16, 1500)
FINAL_STEPS = (16, 600)  # of its first round
WARM_UP, TRIALS = 0.15, 0.5  # of the time; the final has the rest
PROTOCOL = 3  # of the trials: tables of another one are not gone on with
TRIAL_RATES = (1.0, 0.3, 0.1)  # times the optimizer's
HELD_OUT = 256  # samples
PROXY_BATCHES = 16
UNSTAMPED = ("shares", "minutes", "threads")  # settings that another run may change
SETTLED = (
    "steps", "warm_up_steps", "final_steps", "step_seconds", "kernel_bytes", "full_work",
)  # fmt: skip


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


def analyse(
    build: Build,
    model: Model,
    candidates: Candidates,
    arrays: Mapping[str, Any],
    settings: Settings,
    path: Path,
    progress: Progress | None = None,
) -> Table:
    """The table at `path`, with a row for every candidate; goes on where it was left.

    Raises PockError when the file there analyses something else.
    """
    facts = describe(build, model, arrays, settings)
    keys = candidates.keys(settings.shares)
    if path.is_file():
        table = Table.open(path, facts, SETTLED)
        if table.rows and not table.missing(keys):
            return table
    with opened(build, model, candidates, arrays, settings, path, progress) as (bench, measured):
        measured |= _pace(bench, candidates, settings, len(keys))
        table = Table.open(path, {**facts, **measured}, SETTLED)
        if settings.method == "finetune":
            _finetune(bench, candidates, table, keys, progress)
        else:
            _proxy(bench, candidates, table, keys, settings.method, progress)
    return table


@contextlib.contextmanager
def opened(
    build: Build,
    model: Model,
    candidates: Candidates,
    arrays: Mapping[str, Any],
    settings: Settings,
    path: Path,
    progress: Progress | None = None,
) -> Iterator[tuple[Bench, dict[str, Any]]]:
    """The analysis artifact with the data, ready for trials, and what was measured of it."""
    with tempfile.TemporaryDirectory(prefix="pocktvm-analysis-") as work:
        bench, measured = _open(build, model, candidates, arrays, settings, path, work, progress)
        with bench.trainer:
            yield bench, measured


def forget(path: Path) -> None:
    """Remove the artifact of the analysis at `path`: the table is all that stays."""
    shutil.rmtree(_folder(path), ignore_errors=True)


def describe(
    build: Build, model: Model, arrays: Mapping[str, Any] | None, settings: Settings
) -> dict[str, Any]:
    """What an analysis is of; another one's table is not gone on with."""
    facts: dict[str, Any] = {
        "model": model.name,
        "parameters": digest({n: p.value for n, p in model.parameters.items()}),
        "inputs": {n: list(i.shape) for n, i in model.inputs.items()},
        "loss": str(build.loss),
        "optimizer": str(build.optimizer),
        "lr": float(build.optimizer.lr),
    }
    if arrays is not None:
        chosen = {k: v for k, v in asdict(settings).items() if k not in UNSTAMPED}
        facts |= {"data": digest(arrays), "protocol": PROTOCOL}
        facts |= {k: _plain(v) for k, v in chosen.items()}
    return facts


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _folder(path: Path) -> Path:
    return path.with_name(path.name + ".artifact")


def _open(
    build: Build,
    model: Model,
    candidates: Candidates,
    arrays: Mapping[str, Any],
    settings: Settings,
    path: Path,
    work: str,
    progress: Progress | None,
) -> tuple[Bench, dict[str, Any]]:
    """The analysis artifact, compiled or left by a run that was stopped, with the data."""
    from pocktvm import compiler
    from pocktvm.manifest import MANIFEST, damaged_files, read_manifest
    from pocktvm.runtime.trainer import load

    names = {**candidates.head, **candidates.biases(candidates.depths[-1])}
    names |= dict.fromkeys(candidates.weights, 1.0)
    scheme = Scheme({name: 1 for name in names}, name="analysis")
    optimizer = build.optimizer if settings.method == "finetune" else SGD(lr=build.optimizer.lr)
    updated = scheme.resolve(model)
    rates = Rates.of(model, updated)
    folder = _folder(path)
    whole = (folder / MANIFEST).is_file() and not damaged_files(folder, read_manifest(folder))
    if not whole or read_manifest(folder).get("analysis") != _stamp(build, model, settings):
        trial = replace(
            build, scheme=scheme, optimizer=optimizer, target=load_target("host"), limit=None,
            resample=False, rates=True, facts={"analysis": _stamp(build, model, settings)},
        )  # fmt: skip
        compiler.compile(trial, folder, progress)
    step, _ = differentiate(model, updated, build.loss, optimizer, rates)
    step = run_passes(step, build.target)
    trainer = load(folder, settings.threads)
    batch = trainer.inputs[0].shape[0]
    count = len(next(iter(arrays.values())))
    held_out = max(batch, min(HELD_OUT, count // 4) // batch * batch)
    bench = Bench(
        trainer, rates, arrays, str(build.loss), lr=float(build.optimizer.lr),
        seed=settings.seed, held_out=held_out, work=Path(work),
    )  # fmt: skip
    plan = trainer.plan
    code = plan.total_bytes - plan.arena_bytes - plan.by_class.get("frozen", 0)
    pace = cost_of(step, load_target("host")).work
    return bench, {"full_work": pace, "kernel_bytes": code / count_kernels(step)}


def _stamp(build: Build, model: Model, settings: Settings) -> dict[str, Any]:
    return {**describe(build, model, None, settings), "method": settings.method}


def _pace(
    bench: Bench, candidates: Candidates, settings: Settings, trials: int
) -> dict[str, Any]:
    """Steps of the warm-up, of a trial and of the final's first round, so that all together take
    the minutes given; more than the most is not needed, fewer than the least says nothing."""
    step, judge = bench.seconds(candidates.head)
    seconds = settings.minutes * 60

    def steps(share: float, times: float, bounds: tuple[int, int]) -> int:
        return int(np.clip((share * seconds / times - judge) / step, *bounds))

    return {
        "steps": steps(TRIALS, trials + len(TRIAL_RATES) + 1, STEPS),
        "warm_up_steps": steps(WARM_UP, 2, WARM_UP_STEPS),  # for the trials, and for the final
        "final_steps": steps(1 - WARM_UP - TRIALS, rounds_worth(), FINAL_STEPS),
        "step_seconds": step,
    }


def _finetune(
    bench: Bench,
    candidates: Candidates,
    table: Table,
    keys: list[Key],
    progress: Progress | None,
) -> None:
    """Gain: how much lower the held-out loss ends than with the classifier alone."""
    steps = int(table.facts["steps"])
    bench.warm_up(candidates.head, int(table.facts["warm_up_steps"]))
    rate = _rate(bench, steps)
    bench.fit(candidates.head, steps, rate=rate, decay=True)
    alone = bench.held_out_loss()
    left = table.missing(keys)
    begin = time.monotonic()
    for number, key in enumerate(left):
        _tell(progress, len(keys) - len(left) + number, len(keys), number, len(left), begin)
        started = time.monotonic()
        bench.fit(candidates.updated(key), steps, rate=rate, decay=True)
        loss = bench.held_out_loss()
        gain = alone - loss if np.isfinite(loss) else -1e9  # it diverged
        table.add(Row(*key, float(gain), round(time.monotonic() - started, 3)))


def _rate(bench: Bench, steps: int) -> float:
    """The rate of trials, of the optimizer's: the one at which everything together learns best.

    At too high a rate a few steps of a large weight do harm, and it would come out as worthless.
    """
    everything = dict.fromkeys(bench.rates.slots, 1.0)
    losses = []
    for rate in TRIAL_RATES:
        bench.fit(everything, steps, rate=rate, decay=True)
        loss = bench.held_out_loss()
        losses.append(loss if np.isfinite(loss) else np.inf)
    return TRIAL_RATES[int(np.argmin(losses))]


def _tell(
    progress: Progress | None, at: int, total: int, done: int, left: int, begin: float
) -> None:
    if progress is None:
        return
    text = f"{at + 1}/{total}"
    if done:
        seconds = (time.monotonic() - begin) / done * (left - done)
        text += f", {seconds / 60:.0f} min left" if seconds > 90 else f", {seconds:.0f} s left"
    progress("try candidates", text)


def _proxy(
    bench: Bench,
    candidates: Candidates,
    table: Table,
    keys: list[Key],
    method: str,
    progress: Progress | None,
) -> None:
    """grad-norm: mean squared norm of the gradient, what a small step of SGD gains to first order;
    fisher: mean of (weight * gradient)² / 2, what removing the weights would cost."""
    bench.warm_up(candidates.head, int(table.facts["warm_up_steps"]))
    names = dict.fromkeys(bench.rates.slots, 1.0)
    scores: dict[str, np.ndarray] = {}
    for number, rows in enumerate(bench.batches(PROXY_BATCHES)):
        if progress:
            progress("read gradients", f"{number + 1}/{PROXY_BATCHES}")
        for name, gradient in bench.gradient(rows, names).items():
            value = candidates.model.parameters[name].value if method == "fisher" else 1.0
            score = np.square(gradient * value) / (2 if method == "fisher" else 1)
            scores[name] = scores.get(name, np.zeros(())) + score / PROXY_BATCHES
    for key in table.missing(keys):
        learns = {n: p for n, p in candidates.updated(key).items() if n not in candidates.head}
        table.add(Row(*key, float(sum(_score(scores[n], p) for n, p in learns.items()))))


def _score(scores: np.ndarray, part: float) -> float:
    if isinstance(part, Part):
        scores = np.take(scores, part.indices, part.axis)
    return float(scores.sum())
