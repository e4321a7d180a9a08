"""Loss and accuracy over a data set, in numpy, with the meaning torch.nn.functional gives them.

Batches add up to sums and weights, so that a padded last batch counts only its real samples and
the mean over the data set does not depend on the batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pocktvm.errors import PockError
from pocktvm.ir.losses import LOSSES
from pocktvm.ir.options import parse_options

if TYPE_CHECKING:
    from pocktvm.runtime.trainer import Trainer

# (output, labels, options) -> sum of losses, what to divide it by
Summed = tuple[float, float]
Options = Mapping[str, Any]


@dataclass
class Metrics:
    """Adds batches up. `loss` is the text given to `--loss`; "none" means the output is it."""

    loss: str
    total: float = 0.0
    weight: float = 0.0
    correct: int = 0
    counted: int = 0
    samples: int = 0

    def add(self, output: np.ndarray, labels: np.ndarray | None) -> None:
        """Count one batch: model output and labels of the same number of samples."""
        name, options = parse_options(self.loss, "loss", LOSSES)
        output = np.asarray(output, np.float64)
        self.samples += len(output) if output.ndim else 1
        if name == "none" or labels is None:
            self.total, self.weight = self.total + float(output.sum()), self.weight + output.size
            return
        summed, weight = _SUMS[name](output, np.asarray(labels), options)
        self.total, self.weight = self.total + summed, self.weight + weight
        hits = _hits(name, output, labels, options)
        self.correct, self.counted = self.correct + int(hits.sum()), self.counted + hits.size

    def result(self) -> dict[str, float | int | None]:
        """`loss`, `accuracy` (null where the loss has no classes), `samples`."""
        return {
            "loss": self.total / self.weight if self.weight else float("nan"),
            "accuracy": self.correct / self.counted if self.counted else None,
            "samples": self.samples,
        }


def measure(
    trainer: Trainer,
    arrays: Mapping[str, np.ndarray],
    rows: np.ndarray | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float | int | None]:
    """`Metrics.result` of a trainer's predictions over the samples `rows` (None: all of them).

    A last partial batch is padded and the padding not counted. With the loss "none" the output is
    one number for a whole batch, out of which padding could not be taken: the rest is left out,
    and PockError where that is everything. `progress` is called as (samples done, of how many).
    """
    metrics, names = Metrics(trainer.loss), [i.name for i in trainer.inputs]
    labelled, batch = trainer.loss != "none", trainer.inputs[0].shape[0]
    rows = np.arange(len(arrays[names[0]])) if rows is None else rows
    if not labelled:
        rows = rows[: len(rows) - len(rows) % batch]
        if not len(rows):
            raise PockError(
                f"loss 'none' is evaluated in whole batches of {batch}: too few samples"
            )
    for at in range(0, len(rows), batch):
        if progress:
            progress(at, len(rows))
        real = rows[at : at + batch]
        padded = np.concatenate([real, np.repeat(real[-1:], batch - len(real))])
        inputs = names[:-1] if labelled else names
        output = trainer.predict(*[np.asarray(arrays[n][padded]) for n in inputs])
        if labelled:
            metrics.add(output[: len(real)], np.asarray(arrays[names[-1]][real]))
        else:
            metrics.add(output, None)
    return metrics.result()


def _hits(name: str, output: np.ndarray, labels: np.ndarray, options: Options) -> np.ndarray:
    """Which predictions are right, one entry per counted label; empty without classes."""
    if name == "bce_with_logits":
        return ((output > 0) == (labels > 0.5)).ravel()
    if name != "cross_entropy":
        return np.zeros(0, bool)
    counted = labels != options["ignore_index"]
    return (output.argmax(axis=1) == labels)[counted]


def _cross_entropy(output: np.ndarray, labels: np.ndarray, options: Options) -> Summed:
    classes = output.shape[1]
    shifted = output - output.max(axis=1, keepdims=True)
    log_p = np.moveaxis(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)), 1, -1)
    log_p, flat = log_p.reshape(-1, classes), labels.reshape(-1)
    counted = flat != options["ignore_index"]
    log_p, flat = log_p[counted], flat[counted].astype(np.int64)
    weight = np.ones(classes) if options["weight"] is None else np.asarray(options["weight"])
    smoothing = options["label_smoothing"]
    chosen = -log_p[np.arange(len(flat)), flat] * weight[flat]
    spread = -(log_p * weight).sum(axis=1) / classes
    loss = (1 - smoothing) * chosen + smoothing * spread
    return float(loss.sum()), float(weight[flat].sum())


def _bce_with_logits(output: np.ndarray, labels: np.ndarray, options: Options) -> Summed:
    factor = 1 if options["pos_weight"] is None else options["pos_weight"]
    softplus = np.maximum(-output, 0) + np.log1p(np.exp(-np.abs(output)))
    loss = (1 - labels) * output + (1 + (factor - 1) * labels) * softplus
    return float(loss.sum()), float(loss.size)


def _mse(output: np.ndarray, labels: np.ndarray, options: Options) -> Summed:
    return float(((output - labels) ** 2).sum()), float(output.size)


def _l1(output: np.ndarray, labels: np.ndarray, options: Options) -> Summed:
    return float(np.abs(output - labels).sum()), float(output.size)


def _huber(output: np.ndarray, labels: np.ndarray, options: Options) -> Summed:
    delta, gap = options["delta"], np.abs(output - labels)
    loss = np.where(gap <= delta, 0.5 * gap**2, delta * (gap - 0.5 * delta))
    return float(loss.sum()), float(output.size)


def _kl_div(output: np.ndarray, labels: np.ndarray, options: Options) -> Summed:
    """torch's F.kl_div(output, labels): output holds log-probabilities, 0 log 0 is 0."""
    labels = labels.astype(np.float64)
    if options["log_target"]:
        loss = np.exp(labels) * (labels - output)
    else:
        loss = labels * (np.log(np.where(labels > 0, labels, 1)) - output)
    # "sum" of a batch is told as the mean over batches would be: per sample
    weight = loss.size if options["reduction"] == "mean" else len(loss)
    return float(loss.sum()), float(weight)


def _cosine_embedding(output: np.ndarray, labels: np.ndarray, options: Options) -> Summed:
    norms = np.linalg.norm(output, axis=-1) * np.linalg.norm(labels, axis=-1)
    loss = 1 - (output * labels).sum(axis=-1) / np.maximum(norms, 1e-12)
    return float(loss.sum()), float(loss.size)


_SUMS: dict[str, Callable[[np.ndarray, np.ndarray, Options], Summed]] = {
    "cross_entropy": _cross_entropy,
    "bce_with_logits": _bce_with_logits,
    "mse": _mse,
    "l1": _l1,
    "huber": _huber,
    "kl_div": _kl_div,
    "cosine_embedding": _cosine_embedding,
}
