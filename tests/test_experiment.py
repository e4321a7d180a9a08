"""pocktvm.evaluate: tuned on held-out samples alone, reproducible, told as mean and error."""

import math
import subprocess
import sys

import numpy as np
import pytest
from search_case import clouds

import pocktvm
from pocktvm.errors import PockError
from pocktvm.experiment import Evaluation, Run, evaluate, table
from pocktvm.frontend.resolve import resolve_model


@pytest.fixture(scope="module")
def artifact():
    source = resolve_model("mlp:inputs=20,hidden=24,depth=2,classes=5", batch=8)
    return pocktvm.compile(
        source.module, source.example_inputs, optimizer=pocktvm.Adam(), scheme="full"
    )


def samples(count, seed):
    x, y = clouds(count, seed)
    return {"x": x, "y": y}


@pytest.mark.build
def test_it_learns_and_does_so_again(artifact):
    train, test = samples(240, 1), samples(101, 2)
    options = dict(seeds=(0, 1), lrs=(1e-9, 1e-2), epochs=4)
    found = evaluate(artifact, train, test, **options)
    assert [r.lr for r in found.runs] == [1e-2, 1e-2]
    assert found.mean > 0.8 and 0 <= found.standard_error < 0.2
    assert found.arena_bytes == artifact.plan.arena_bytes
    again = evaluate(artifact.path, train, test, **options)
    assert again.scores == found.scores
    assert [r.held_out_loss for r in again.runs] == [r.held_out_loss for r in found.runs]


@pytest.mark.build
def test_channels_can_change_between_its_epochs():
    source = resolve_model("mlp:inputs=20,hidden=24,depth=2,classes=5", batch=8)
    part = pocktvm.compile(
        source.module, source.example_inputs, optimizer=pocktvm.Adam(), resample=True,
        scheme={"*.weight": 0.25},
    )  # fmt: skip
    options = dict(seeds=(0,), lrs=(1e-2,), epochs=4, patience=4)
    data = samples(240, 1), samples(101, 2)
    fixed, other, again = (evaluate(part, *data, resample=n, **options) for n in (0, 1, 1))
    losses = [e.runs[0].held_out_loss for e in (fixed, other, again)]
    assert losses[1] == losses[2] != losses[0]


@pytest.mark.build
def test_the_test_samples_choose_nothing(artifact):
    train, options = samples(240, 1), dict(seeds=(0,), lrs=(1e-3, 1e-2), epochs=3)
    plain = evaluate(artifact, train, samples(80, 2), **options).runs[0]
    noise = samples(80, 3) | {"y": np.zeros(80, np.int64)}
    other = evaluate(artifact, train, noise, **options).runs[0]
    assert (plain.lr, plain.epochs, plain.held_out_loss) == (
        other.lr, other.epochs, other.held_out_loss,
    )  # fmt: skip
    assert plain.accuracy != other.accuracy


@pytest.mark.build
def test_it_stops_when_the_held_out_loss_rises(artifact):
    train = samples(48, 1)
    train["y"] = np.random.default_rng(5).integers(0, 5, 48)  # nothing to learn but by heart
    run = evaluate(
        artifact, train, samples(40, 2), seeds=(0,), lrs=(0.05,), epochs=40, patience=2
    ).runs[0]
    assert run.epochs < 10


@pytest.mark.build
def test_data_it_cannot_use_is_refused(artifact):
    with pytest.raises(PockError, match="held out"):
        evaluate(artifact, samples(12, 1), samples(8, 2))
    with pytest.raises(PockError, match="training data"):
        evaluate(artifact, {"x": np.zeros((40, 3), np.float32), "y": np.zeros(40, int)}, {})


def test_mean_and_error_over_seeds():
    runs = tuple(Run(s, 1e-3, 3, 0.5, 0.6, a, 1.0) for s, a in enumerate((0.5, 0.6, 0.7)))
    found = Evaluation(runs, 10**6, 2 * 10**6, 0.002)
    assert found.mean == pytest.approx(0.6)
    assert found.standard_error == pytest.approx(0.1 / math.sqrt(3))
    assert "| full | 0.6000 ± 0.0577 | 0.001, 0.001, 0.001 | 1.00 MB | 2.00 MB | 2.0 ms |" in table(
        {"full": found}
    )
    assert math.isnan(Evaluation(runs[:1], 1, 1, 1.0).standard_error)
    losses = Evaluation((Run(0, 1e-3, 1, 0.5, 2.5, None, 1.0),), 1, 1, 1.0)
    assert losses.mean == 2.5


def test_it_needs_neither_torch_nor_tvm():
    code = "import sys, pocktvm; pocktvm.evaluate; print({'torch', 'tvm'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
