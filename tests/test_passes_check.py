"""POCKTVM_CHECK=1 on the small models: every pass keeps what the reference computes."""

from __future__ import annotations

import pytest
from equality import REDUCED

from pocktvm.autodiff.differentiate import differentiate
from pocktvm.autodiff.losses import parse_loss
from pocktvm.autodiff.optimizers import parse_optimizer
from pocktvm.errors import InternalError
from pocktvm.frontend.resolve import resolve_model
from pocktvm.frontend.torch import import_torch
from pocktvm.ir.scheme import Scheme
from pocktvm.levers import peak, shrunk
from pocktvm.passes import run_passes
from pocktvm.passes.compare import compare
from pocktvm.targets import load_target

FAST = {("mlp", "full"), ("mlp", "pockengine"), ("cnn", "full"), ("cnn", "pockengine")}
CASES = [
    pytest.param(m, s, marks=() if (m, s) in FAST else pytest.mark.slow)
    for m in REDUCED
    for s in ("full", "pockengine")
]


@pytest.mark.parametrize(("model", "scheme"), CASES)
def test_every_pass_keeps_the_numbers_of_a_model(model, scheme, monkeypatch):
    """The budget's passes too: transient bytes down to two thirds."""
    monkeypatch.setenv("POCKTVM_CHECK", "1")
    spec, batch = REDUCED[model]
    source = resolve_model(spec, batch=batch)
    imported = import_torch(source.module, source.example_inputs, scheme=source.scheme)
    updated = Scheme.parse(scheme).resolve(imported)
    rule = parse_optimizer("momentum" if scheme == "full" else "sgd")
    graphs = differentiate(imported, updated, parse_loss(source.loss or "cross_entropy"), rule)
    optimised = [run_passes(graph) for graph in graphs]
    kept = sum(a.nbytes for g in optimised for a in g.consts.values())
    kept += sum(p.value.nbytes for p in optimised[0].params.values())
    shrunk(optimised, kept + 2 * peak(optimised[0]) // 3, load_target("host"))


def test_the_check_sees_a_changed_number():
    spec, batch = REDUCED["mlp"]
    source = resolve_model(spec, batch=batch)
    model = import_torch(source.module, source.example_inputs)
    updated = dict.fromkeys(model.parameters, 1.0)
    loss = parse_loss("cross_entropy")
    step = differentiate(model, updated, loss, parse_optimizer("sgd"))[0]
    wrong = differentiate(model, updated, loss, parse_optimizer("sgd:weight_decay=10"))[0]
    with pytest.raises(InternalError, match="changes"):
        compare(step, wrong, "a wrong pass")
