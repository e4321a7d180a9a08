"""Models and samples that the tests of the search share."""

from __future__ import annotations

import numpy as np

from pocktvm.autodiff.losses import parse_loss
from pocktvm.autodiff.optimizers import parse_optimizer
from pocktvm.build import Build
from pocktvm.frontend.resolve import resolve_model
from pocktvm.ir.scheme import Scheme
from pocktvm.targets import load_target

MLP = "mlp:inputs=20,hidden=24,depth=4,classes=5"
CNN = "cnn:channels=8,depth=3,image=12,classes=5"


def clouds(count=200, seed=0, classes=5):
    """Points of five clouds: learnable in a few steps."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    centres = np.random.default_rng(7).standard_normal((5, 20))
    return (centres[labels] + 0.5 * rng.standard_normal((count, 20))).astype(np.float32), labels


def build_of(spec, optimizer="adam", samples=None, batch=8):
    source = resolve_model(spec, batch=batch)
    return Build(
        source.module, source.example_inputs, Scheme.full(), parse_loss("cross_entropy"),
        parse_optimizer(optimizer), load_target("host"), name=source.name, samples=samples,
    )  # fmt: skip
