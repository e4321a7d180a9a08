"""How accurate does an artifact become? Repeated over seeds, tuned on held-out samples.

For every seed: a random part of the training samples is held out, the learning rate is the one
whose held-out loss is lowest (there, or over the first seeds), training stops when that loss no
longer falls and goes back to where it was lowest, and the test samples are looked at once, at the
end. Imports neither torch nor TVM.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pocktvm.data import check_data
from pocktvm.errors import PockError
from pocktvm.metrics import measure
from pocktvm.runtime.trainer import Trainer, load

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Run:
    """The run of one seed, at the rate that was chosen for it.

    epochs    after which the held-out loss was lowest
    losses    means a sample
    accuracy  share of right predictions on the test; None where the loss has no classes
    seconds   of training and of measuring on what was held out
    """

    seed: int
    lr: float
    epochs: int
    held_out_loss: float
    test_loss: float
    accuracy: float | None
    seconds: float


@dataclass(frozen=True)
class Evaluation:
    """All seeds of one artifact, with what it costs.

    arena_bytes, total_bytes   of its memory plan
    step_seconds               the fastest step that was seen
    """

    runs: tuple[Run, ...]
    arena_bytes: int
    total_bytes: int
    step_seconds: float

    @property
    def scores(self) -> list[float]:
        """Accuracies; where there are none, test losses."""
        found = [r.test_loss if r.accuracy is None else r.accuracy for r in self.runs]
        return [float(v) for v in found]

    @property
    def mean(self) -> float:
        """Mean of the scores."""
        return float(np.mean(self.scores))

    @property
    def standard_error(self) -> float:
        """Standard error of that mean, over the seeds; NaN for a single one."""
        count = len(self.runs)
        return float(np.std(self.scores, ddof=1) / math.sqrt(count)) if count > 1 else math.nan

    def facts(self) -> dict[str, Any]:
        """Everything as plain numbers and lists, for JSON and for `table`."""
        return {
            "mean": self.mean, "standard_error": self.standard_error,
            "arena_bytes": self.arena_bytes, "total_bytes": self.total_bytes,
            "step_ms": 1e3 * self.step_seconds, "runs": [asdict(r) for r in self.runs],
        }  # fmt: skip


def evaluate(
    artifact: Any,
    train: Arrays,
    test: Arrays,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    lrs: Sequence[float] = (3e-4, 1e-3, 3e-3),
    epochs: int = 10,
    patience: int = 2,
    held_out: float = 0.1,
    threads: int | None = None,
    resample: int = 0,
    lr_seeds: int | None = None,
    decay: bool = False,
    progress: Callable[[str, str], None] | None = None,
) -> Evaluation:
    """Train `artifact` (an Artifact, or its folder) once a seed and a learning rate.

    train, test   arrays by input name, labels as `y`, axis 0 samples
    seeds, lrs    what is tried; every run begins at the artifact's weights
    epochs        most passes over the training samples
    patience      epochs without a lower held-out loss after which a run ends
    held_out      share of the training samples that only choose (rate, epoch)
    threads       of the trainer; None: as many as the artifact was built for
    lr_seeds      how many seeds, the first, try every rate; the others take the one with the lowest
                  mean of held-out losses there (None: every seed chooses its own)
    decay         the rate falls to zero over `epochs` along half a cosine
    resample      epochs after which other channels learn, drawn from the seed (0: never); for
                  artifacts built with `resample`
    progress      called as (seed, rate) before each run

    Raises PockError for data the artifact does not take, and for too little of it.
    """
    folder = Path(getattr(artifact, "path", artifact))
    with load(folder, threads) as trainer:
        bench = _Bench(trainer, train, test, held_out, _Plan(epochs, patience, resample, decay))
        tried = dict(enumerate(seeds)) if lr_seeds is None else dict(enumerate(seeds[:lr_seeds]))
        losses: dict[float, list[float]] = {lr: [] for lr in sorted(lrs)}
        runs = []
        for number, seed in enumerate(seeds):
            rates = list(losses)
            if number not in tried:
                rates = [min(losses, key=lambda lr: float(np.mean(losses[lr])))]
            found = []
            for lr in rates:
                if progress:
                    progress(f"seed {seed}", f"lr {lr:g}")
                found.append(bench.fit(seed, lr))
                losses[lr].append(found[-1].held_out_loss)
                if found[-1].held_out_loss == min(run.held_out_loss for run in found):
                    bench.keep()
            runs.append(bench.tested(min(found, key=lambda run: run.held_out_loss)))
        return Evaluation(
            tuple(runs), trainer.plan.arena_bytes, trainer.plan.total_bytes, bench.step_seconds
        )


@dataclass(frozen=True)
class _Plan:
    """What all runs have in common; see `evaluate`."""

    epochs: int
    patience: int
    resample: int
    decay: bool

    def factor(self, done: float) -> float:
        """Of the rate, where `done` of all epochs' steps were taken."""
        return 0.5 * (1 + math.cos(math.pi * done)) if self.decay else 1.0


class _Bench:
    """A trainer with checked data."""

    def __init__(
        self, trainer: Trainer, train: Arrays, test: Arrays, held_out: float, plan: _Plan
    ) -> None:
        self.trainer, self.plan = trainer, plan
        self.train = check_data(train, trainer.inputs, where="the training data")
        self.test = check_data(test, trainer.inputs, where="the test data", whole_batch=False)
        self.names = [i.name for i in trainer.inputs]
        self.batch = trainer.inputs[0].shape[0]
        count = len(self.train[self.names[0]])
        self.held_out = max(self.batch, int(held_out * count))
        if not 0 < held_out < 1 or count - self.held_out < self.batch:
            raise PockError(
                f"{count} samples do not leave a batch of {self.batch} to train on beside "
                f"{self.held_out} held out; give more samples."
            )
        self.step_seconds = math.inf
        self.work = tempfile.TemporaryDirectory(prefix="pocktvm-evaluate-")
        names = ("start", "best", "kept")
        self.start, self.best, self.kept = (Path(self.work.name) / n for n in names)
        trainer.save(self.start)

    def fit(self, seed: int, lr: float) -> Run:
        """One run from the artifact's weights; the trainer then holds its best epoch. The test
        samples are not looked at: see `tested`."""
        began = time.perf_counter()
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(self.train[self.names[0]]))
        held, rows = order[: self.held_out], order[self.held_out :]
        self.trainer.load(self.start)
        lowest, best_epoch, resample = math.inf, 0, self.plan.resample
        for epoch in range(1, self.plan.epochs + 1):
            if resample and epoch > 1 and (epoch - 1) % resample == 0:
                self.trainer.resample((seed << 32) + epoch)
            self._epoch(rng.permutation(rows), lr, epoch)
            loss = float(measure(self.trainer, self.train, held)["loss"] or 0.0)
            if loss < lowest:
                lowest, best_epoch = loss, epoch
                self.trainer.save(self.best)
            if not math.isfinite(loss) or epoch - best_epoch >= self.plan.patience:
                break
        self.trainer.load(self.best if best_epoch else self.start)
        return Run(seed, lr, best_epoch, lowest, math.nan, None, time.perf_counter() - began)

    def keep(self) -> None:
        """Remember the weights of the run that just ended."""
        self.trainer.save(self.kept)

    def tested(self, run: Run) -> Run:
        """`run`, whose weights were kept, with its score on the test samples."""
        self.trainer.load(self.kept)
        found = measure(self.trainer, self.test)
        accuracy = None if found["accuracy"] is None else float(found["accuracy"])
        return replace(run, test_loss=float(found["loss"] or 0.0), accuracy=accuracy)

    def _epoch(self, rows: np.ndarray, lr: float, epoch: int) -> None:
        for at in range(0, len(rows) - self.batch + 1, self.batch):
            chosen = np.sort(rows[at : at + self.batch])
            arrays = [np.asarray(self.train[n][chosen]) for n in self.names]
            done = (epoch - 1 + at / len(rows)) / self.plan.epochs
            began = time.perf_counter()
            self.trainer.step(*arrays, lr=lr * self.plan.factor(done))
            self.step_seconds = min(self.step_seconds, time.perf_counter() - began)


def table(results: Mapping[str, Evaluation | Mapping[str, Any]]) -> str:
    """A Markdown table: score as mean ± standard error, rates chosen, memory, time of a step."""
    lines = [
        "| scheme | score | lr by seed | arena | plan | step |",
        "|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        facts = result.facts() if isinstance(result, Evaluation) else result
        error = facts["standard_error"]
        rates = ", ".join(f"{run['lr']:g}" for run in facts["runs"])
        spread = "" if error is None or math.isnan(error) else f" ± {error:.4f}"
        lines.append(
            f"| {name} | {facts['mean']:.4f}{spread} | {rates} | "
            f"{facts['arena_bytes'] / 1e6:.2f} MB | {facts['total_bytes'] / 1e6:.2f} MB | "
            f"{facts['step_ms']:.1f} ms |"
        )
    return "\n".join(lines)
