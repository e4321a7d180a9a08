"""Trials on one compiled artifact: everything may learn, rates of zero freeze what should not.

Every trial starts from the same weights (the classifier warmed up alone, the optimizer fresh), sees
the same samples in the same order, and is judged by the loss on the same held-out samples.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pocktvm.ir.rates import Rates
from pocktvm.metrics import Metrics
from pocktvm.runtime.tensor_file import (
    read_index,
    read_metadata,
    read_tensor,
    write_tensors,
)
from pocktvm.runtime.trainer import Trainer

JUDGES = 256  # samples that judge a trial


class Bench:
    """An open analysis artifact with its data, split into training and held-out samples."""

    def __init__(
        self,
        trainer: Trainer,
        rates: Rates,
        arrays: Mapping[str, np.ndarray],
        loss: str,
        *,
        lr: float,
        seed: int,
        held_out: int,
        work: Path,
    ) -> None:
        self.trainer, self.rates, self.loss, self.lr, self.seed = trainer, rates, loss, lr, seed
        self.names = [i.name for i in trainer.inputs[:-1]]
        self.x_names = self.names if loss.startswith("none") else self.names[:-1]
        self.arrays = arrays
        self.batch = trainer.inputs[0].shape[0]
        order = np.random.default_rng(seed).permutation(len(arrays[self.names[0]]))
        self.test, self.train = order[:held_out], order[held_out:]
        self.start, self.work = work / "start.safetensors", work
        trainer.save(self.start)

    def warm_up(self, head: Mapping[str, float], steps: int) -> None:
        """Train the classifier alone, until little is left for it to learn: before that it learns
        more than any other tensor, and what those add shows late. What trials start from are these
        weights and a fresh optimizer."""
        self.fit(head, steps, decay=True)
        state = self.trainer.state_dict()
        index = read_index(self.start)
        tensors = {n: read_tensor(self.start, entry) for n, entry in index.items()}
        tensors |= {n: state[n] for n in head if n in tensors}
        metadata = read_metadata(self.start)
        metadata.pop("crc32", None)
        warm = self.work / "warm.safetensors"
        write_tensors(warm, tensors, metadata)
        self.start = warm

    def fit(
        self, updated: Mapping[str, float], steps: int, *, rate: float = 1.0, decay: bool = False
    ) -> None:
        """Train what `updated` names from the start, for so many steps, at `rate` times the
        bench's; with `decay` it falls to zero along half a cosine."""
        self.trainer.load(self.start)
        factors = self.rates.vector(updated)
        for number, rows in enumerate(self.batches(steps)):
            falls = 0.5 * (1 + math.cos(math.pi * number / steps)) if decay else 1.0
            self.step(rows, factors, self.lr * rate * falls)

    def step(self, rows: np.ndarray, factors: np.ndarray, lr: float) -> float:
        """One step on these samples."""
        arrays = [np.asarray(self.arrays[n][rows]) for n in self.names]
        return self.trainer.step(*arrays, factors, lr=lr)

    def batches(self, steps: int) -> list[np.ndarray]:
        """The samples of the first steps, whole epochs shuffled one after another."""
        rng, per_epoch = np.random.default_rng([self.seed, 1]), len(self.train) // self.batch
        found: list[np.ndarray] = []
        while len(found) < steps:
            order = rng.permutation(self.train)[: per_epoch * self.batch]
            found += list(order.reshape(per_epoch, self.batch))
        return [np.sort(rows) for rows in found[:steps]]

    def held_out_loss(self, whole: bool = False) -> float:
        """Mean loss on the held-out samples, with the weights as they are; on the first of them,
        or on the `whole`."""
        metrics = Metrics(self.loss)
        some = max(self.batch, JUDGES // self.batch * self.batch)
        test = self.test if whole else self.test[:some]
        for begin in range(0, len(test), self.batch):
            rows = np.sort(test[begin : begin + self.batch])
            output = self.trainer.predict(*[np.asarray(self.arrays[n][rows]) for n in self.x_names])
            labelled = len(self.x_names) < len(self.names)
            metrics.add(output, np.asarray(self.arrays[self.names[-1]][rows]) if labelled else None)
        return float(metrics.result()["loss"] or 0.0)

    def seconds(self, head: Mapping[str, float]) -> tuple[float, float]:
        """(of a step, of judging a trial), each measured a few times."""
        self.fit(head, 2)
        begin = time.perf_counter()
        self.fit(head, 5)
        middle = time.perf_counter()
        self.held_out_loss()
        return (middle - begin) / 5, time.perf_counter() - middle

    def gradient(self, rows: np.ndarray, names: Mapping[str, float]) -> dict[str, np.ndarray]:
        """The gradients of the loss on these samples: what one step of plain SGD subtracts."""
        self.trainer.load(self.start)
        before = self.trainer.state_dict()
        self.step(rows, np.ones(self.rates.size, np.float32), 1.0)
        after = self.trainer.state_dict()
        return {n: before[n].astype(np.float64) - after[n] for n in names}
