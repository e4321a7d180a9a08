"""What a plan promises: close to its lower bound, and what the running program takes."""

from __future__ import annotations

import pytest

from benchmarks.memory import SCHEMES, measure, table
from benchmarks.workloads import WORKLOADS
from pocktvm import memory
from pocktvm.build import Build
from pocktvm.frontend.resolve import resolve_model
from pocktvm.models import MODELS

pytestmark = pytest.mark.build
# pages of code and stack, which a first step touches too: they are no part of the arena
PAGES = 400_000


def check(found):
    assert found["lower_bound_bytes"] <= found["arena_bytes"] <= 1.05 * found["lower_bound_bytes"]
    within = max(0.05 * found["arena_bytes"], PAGES)
    assert abs(found["measured_bytes"] - found["arena_bytes"]) <= within, table([found])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_small_model_takes_what_its_plan_says(tmp_path, scheme):
    check(measure("cnn:channels=32,depth=3,image=64,classes=5", scheme, tmp_path / "a"))


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_every_zoo_model_takes_what_its_plan_says(tmp_path, model):
    for scheme in SCHEMES:
        check(measure(model, scheme, tmp_path / scheme))


# MB of the step's live bytes without trained weights, from the graph before kernels add workspaces
BOUNDS = [
    ("w1b", "pockengine", 2.0),
    ("w1a", "pockengine", 5.0),
    ("w1a", "full", 125.0),
    ("w2", "pockengine", 10.0),
    ("w3", "pockengine", 60.0),
    ("w4", "pockengine", 70.0),
]


@pytest.mark.parametrize(
    "key, scheme, limit",
    [*BOUNDS[:1], *(pytest.param(*b, marks=pytest.mark.slow) for b in BOUNDS[1:])],
)
def test_a_step_keeps_little_beside_its_weights(key, scheme, limit):
    work = WORKLOADS[key]
    source = resolve_model(work.model, batch=work.batch)
    build = Build.of(
        source.module, source.example_inputs, scheme=scheme, loss=source.loss,
        published=source.scheme,
    )  # fmt: skip
    plan = memory.estimate(build.programs())
    assert plan.lower_bound_bytes - plan.by_class["trained"] <= limit * 1e6
