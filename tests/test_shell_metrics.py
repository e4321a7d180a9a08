"""eval's loss is torch's, whatever the batches the samples came in."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pocktvm.errors import PockError
from pocktvm.metrics import Metrics

RNG = np.random.default_rng(0)
LOGITS = RNG.standard_normal((11, 5))
CLASSES = RNG.integers(0, 5, 11)
TARGETS = RNG.standard_normal((11, 5))
IGNORING = np.where(np.arange(11) % 3 == 0, -100, CLASSES)
PROBABILITIES = np.exp(TARGETS) / np.exp(TARGETS).sum(1, keepdims=True)
LOG_PROBABILITIES = LOGITS - np.log(np.exp(LOGITS).sum(1, keepdims=True))


def t(array):
    return torch.tensor(array)


CASES = [
    ("cross_entropy", LOGITS, CLASSES, lambda: F.cross_entropy(t(LOGITS), t(CLASSES))),
    ("cross_entropy", LOGITS, IGNORING, lambda: F.cross_entropy(t(LOGITS), t(IGNORING))),
    (
        "cross_entropy:label_smoothing=0.1,ignore_index=2",
        LOGITS,
        CLASSES,
        lambda: F.cross_entropy(t(LOGITS), t(CLASSES), label_smoothing=0.1, ignore_index=2),
    ),
    (
        "bce_with_logits",
        LOGITS,
        (TARGETS > 0) * 1.0,
        lambda: F.binary_cross_entropy_with_logits(t(LOGITS), t((TARGETS > 0) * 1.0)),
    ),
    (
        "cross_entropy:weight=[1,2,3,0.5,1],label_smoothing=0.2",
        LOGITS,
        CLASSES,
        lambda: F.cross_entropy(
            t(LOGITS), t(CLASSES), weight=t([1.0, 2, 3, 0.5, 1]).double(), label_smoothing=0.2
        ),
    ),
    (
        "bce_with_logits:pos_weight=3",
        LOGITS,
        (TARGETS > 0) * 1.0,
        lambda: F.binary_cross_entropy_with_logits(
            t(LOGITS), t((TARGETS > 0) * 1.0), pos_weight=t(3.0)
        ),
    ),
    (
        "kl_div:log_target=true,reduction=batchmean",
        LOG_PROBABILITIES,
        np.log(PROBABILITIES),
        lambda: F.kl_div(
            t(LOG_PROBABILITIES), t(np.log(PROBABILITIES)), reduction="batchmean", log_target=True
        ),
    ),
    ("mse", LOGITS, TARGETS, lambda: F.mse_loss(t(LOGITS), t(TARGETS))),
    ("l1", LOGITS, TARGETS, lambda: F.l1_loss(t(LOGITS), t(TARGETS))),
    ("huber:delta=0.5", LOGITS, TARGETS, lambda: F.huber_loss(t(LOGITS), t(TARGETS), delta=0.5)),
    (
        "kl_div",
        LOG_PROBABILITIES,
        PROBABILITIES,
        lambda: F.kl_div(t(LOG_PROBABILITIES), t(PROBABILITIES), reduction="mean"),
    ),
]


@pytest.mark.parametrize(("loss", "output", "labels", "expected"), CASES, ids=lambda v: str(v)[:20])
@pytest.mark.filterwarnings("ignore:reduction")
def test_loss_over_uneven_batches_is_torchs(loss, output, labels, expected):
    metrics = Metrics(loss)
    for start in range(0, 11, 4):
        metrics.add(output[start : start + 4], labels[start : start + 4])
    result = metrics.result()
    assert result["loss"] == pytest.approx(float(expected()), rel=1e-9)
    assert result["samples"] == 11


def test_dense_cross_entropy_has_the_class_on_axis_1():
    output, labels = RNG.standard_normal((2, 5, 3, 4)), RNG.integers(0, 5, (2, 3, 4))
    metrics = Metrics("cross_entropy")
    metrics.add(output, labels)
    assert metrics.result()["loss"] == pytest.approx(float(F.cross_entropy(t(output), t(labels))))
    expected = float((output.argmax(1) == labels).mean())
    assert metrics.result()["accuracy"] == pytest.approx(expected)


def test_accuracy_leaves_ignored_labels_out():
    metrics = Metrics("cross_entropy")
    metrics.add(LOGITS, IGNORING)
    kept = IGNORING != -100
    expected = float((LOGITS.argmax(1) == CLASSES)[kept].mean())
    assert metrics.result()["accuracy"] == pytest.approx(expected)


def test_losses_without_classes_have_no_accuracy():
    metrics = Metrics("mse")
    metrics.add(LOGITS, TARGETS)
    assert metrics.result()["accuracy"] is None


def test_every_loss_is_written_and_measured():
    code = (
        "from pocktvm.autodiff.losses import KINDS; from pocktvm.ir.losses import LOSSES; "
        "from pocktvm.metrics import _SUMS; assert {*KINDS} == {*LOSSES} == {*_SUMS, 'none'}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_loss():
    with pytest.raises(PockError, match="no loss 'hinge'"):
        Metrics("hinge").add(LOGITS, CLASSES)
