"""The search: contributions measured once, choices that fit the planner."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from search_case import CNN, MLP, build_of
from slices import KINDS, assert_slices_equal, kinds, parts_of, torch_slices

import pocktvm
from pocktvm.build import Build
from pocktvm.errors import PockError
from pocktvm.frontend.resolve import resolve_model
from pocktvm.frontend.source import import_model
from pocktvm.ir.rates import Rates
from pocktvm.ir.scheme import Scheme
from pocktvm.search.activity import measure_activity
from pocktvm.search.auto import search
from pocktvm.search.candidates import find_candidates
from pocktvm.search.curve import smoothed
from pocktvm.search.finals import ROUNDS, gains_of, judged, key_of, winner
from pocktvm.search.planner import Planner
from pocktvm.search.select import Limits, Selector
from pocktvm.search.study import Settings
from pocktvm.search.table import Row, Table

pytestmark = pytest.mark.build

# Rates -------------------------------------------------------------------------------------------


def test_rates_of_an_artifact_that_trains_all_are_a_scheme():
    module, inputs, labels = kinds()
    scheme = {k: v for k, v in KINDS.items() if not str(v).startswith("out") and k != "norm.weight"}
    scheme["fc.bias"] = 1
    model, updated = parts_of(module, inputs, scheme)
    rates = Rates.of(model, Scheme.full().resolve(model))
    artifact = pocktvm.compile(
        module, inputs, rates=True, optimizer=pocktvm.SGD(lr=0.05, momentum=0.9, weight_decay=0.1)
    )
    with artifact.load() as trainer:
        for _ in range(4):
            trainer.step(inputs[0].numpy(), labels.numpy(), rates.vector(updated))
        state = trainer.state_dict()

    def make(parameters):
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.1)

    _, theirs, start = torch_slices(module, inputs, labels, updated, make)
    assert_slices_equal(state, theirs, start, updated)


def test_rates_tell_no_part_of_another_axis():
    module, inputs, _ = kinds()
    model, updated = parts_of(module, inputs, {"fc.weight": "out:0.4"})
    with pytest.raises(ValueError, match="axis"):
        Rates.of(model, Scheme.full().resolve(model)).vector(updated)


# Activity ----------------------------------------------------------------------------------------


def test_activity_is_the_mean_square_of_each_channel():
    module, (x,), _ = kinds()
    model = import_model(module, (x,))
    found = measure_activity(model, {next(iter(model.inputs)): x.numpy()})
    np.testing.assert_allclose(found["plain.weight"]["in"], x.square().mean((0, 2, 3)), rtol=1e-5)
    y = module.plain(x) - module.plain.bias.reshape(-1, 1, 1)
    np.testing.assert_allclose(
        found["plain.weight"]["out"], y.square().mean((0, 2, 3)).detach(), rtol=1e-4
    )
    assert found["fc.weight"]["in"].shape == (10,) and found["fc.weight"]["out"].shape == (5,)


def test_a_build_ranks_channels_by_what_they_carry():
    build = build_of(CNN)
    quiet = np.random.default_rng(0).standard_normal((16, 3, 12, 12)).astype(np.float32)
    quiet[:, 1] = 0
    name = next(n for n in Scheme.full().resolve(build.resolve()[0]))
    scheme = Scheme({name: "activation:0.67"})
    samples = {next(iter(build.resolve()[0].inputs)): quiet}
    _, updated = replace(build, scheme=scheme, samples=samples).resolve()
    assert updated[name].indices == (0, 2)


# Choosing ----------------------------------------------------------------------------------------


def made_up(tmp_path, candidates, gains):
    table = Table.open(tmp_path / "t.jsonl", {"full_work": 1.0, "step_seconds": 1.0}, ())
    for key in candidates.keys((1.0, 0.5, 0.25)):
        table.add(Row(*key, gains(key)))
    return table


def test_the_choice_is_the_best_of_all_that_fit(tmp_path):
    """Against every combination of weights and shares, planned one by one."""
    build = build_of("mlp:inputs=20,hidden=24,depth=3,classes=5")
    model, _ = build.resolve()
    candidates = find_candidates(model, ["blocks.*.weight"])
    rng = np.random.default_rng(3)
    base = {n: rng.uniform(0.1, 1) for n in candidates.weights}
    table = made_up(
        tmp_path, candidates,
        lambda key: 0.05 * int(key[1]) if key[0] == "bias" and key[1] != "all"
        else base.get(key[1], 0.0) * key[2] ** 0.5,
    )  # fmt: skip
    planner = Planner(model, build.loss, build.optimizer, build.target)
    everything = []
    for shares in itertools.product((0, 0.25, 0.5, 1.0), repeat=len(candidates.weights)):
        weights = {n: s for n, s in zip(candidates.weights, shares, strict=True) if s}
        depth = max(
            (d for d in candidates.depths if d != "all"),
            key=lambda d: (-all(candidates.reaches(d, n) for n in weights), int(d)),
        )
        for depth in candidates.depths:
            if depth == "all" or not all(candidates.reaches(depth, n) for n in weights):
                continue
            updated = {**candidates.biases(depth)}
            updated |= {n: candidates.part(n, s) for n, s in weights.items()}
            gain = 0.05 * int(depth) + sum(base[n] * s**0.5 for n, s in weights.items())
            everything.append((gain, planner.cost(updated).total_bytes))
    low, high = min(b for _, b in everything), max(b for _, b in everything)
    for share in (0.0, 0.3, 0.6, 1.0):
        limit = int(low + share * (high - low))
        choice = Selector(table, candidates, planner).best(Limits(limit))
        assert choice.cost.total_bytes <= limit
        best = max(gain for gain, nbytes in everything if nbytes <= limit)
        assert choice.gain >= 0.93 * best, (share, choice.gain, best)


def test_nothing_on_the_frontier_beats_another(tmp_path):
    build = build_of(MLP)
    model, _ = build.resolve()
    candidates = find_candidates(model)
    table = made_up(tmp_path, candidates, lambda key: 0.1 * key[2] if key[0] == "weight" else 0.02)
    selector = Selector(
        table, candidates, Planner(model, build.loss, build.optimizer, build.target)
    )
    choice = selector.best(Limits())
    selector.explore(choice)
    points = selector.frontier(choice)
    assert choice in points and len(points) >= 3
    assert not any(a.beats(b) for a in points for b in points)
    assert all(p.gain <= choice.gain for p in points)


def test_a_contribution_that_hurts_is_not_chosen(tmp_path):
    build = build_of(MLP)
    model, _ = build.resolve()
    candidates = find_candidates(model)
    table = made_up(tmp_path, candidates, lambda key: -1.0)
    planner = Planner(model, build.loss, build.optimizer, build.target)
    choice = Selector(table, candidates, planner).best(Limits())
    assert (choice.depth, choice.weights) == ("0", {})


def test_noise_of_single_trials_is_averaged():
    """Heights times a power of the share, measured with noise: what comes out is nearer to them."""
    rng = np.random.default_rng(0)
    heights = {f"w{i}": h for i, h in enumerate(rng.uniform(0, 1, 40))}
    shares = (1.0, 0.5, 0.25, 0.125)
    true = {(n, s): h * s**0.4 for n, h in heights.items() for s in shares}
    noisy = {key: gain + rng.normal(0, 0.2) for key, gain in true.items()}
    found = smoothed(noisy, shares)
    rms = [np.sqrt(np.mean([(m[k] - g) ** 2 for k, g in true.items()])) for m in (noisy, found)]
    assert rms[1] < 0.7 * rms[0]
    some = {key: gain for key, gain in true.items() if key[1] in (1.0, 0.25)}
    for key, gain in smoothed(some, shares).items():
        assert gain == pytest.approx(true[key])
    assert smoothed({("w", 1.0): -1e9, ("v", 1.0): 0.5}, shares)["w", 1.0] == 0


def test_finalists_differ_and_fit(tmp_path):
    build = build_of(MLP)
    model, _ = build.resolve()
    candidates = find_candidates(model)
    table = made_up(tmp_path, candidates, lambda key: 0.1 * key[2] if key[0] == "weight" else 0.02)
    planner = Planner(model, build.loss, build.optimizer, build.target)
    selector = Selector(table, candidates, planner)
    most = selector.best(Limits()).cost.total_bytes
    limits = Limits((most + planner.cost(candidates.head).total_bytes) // 2)
    found = selector.finalists(limits)
    names = {recipe.name for recipe, _ in found}
    assert {"contributions", "published", "blocks"} <= names  # "even" where it is none of these
    whole = [recipe.base for recipe, _ in found if recipe.name == "blocks"]
    assert all(len(set(base.values())) == 1 for base in whole)
    assert all(limits.hold(choice.cost) for _, choice in found)
    assert len({json.dumps([c.depth, sorted(c.weights.items())]) for _, c in found}) == len(found)
    published = next(choice for recipe, choice in found if recipe.name == "published")
    learns = set(Scheme.pockengine().resolve(model)) - set(published.updated)
    assert not learns


def test_without_a_limit_all_that_gains_learns(tmp_path):
    """Sizes rounded up to the knapsack's bins leave none out; a weight takes its best share."""
    build = build_of(MLP)
    model, _ = build.resolve()
    candidates = find_candidates(model)
    table = made_up(tmp_path, candidates, lambda key: key[2] if key[0] == "weight" else 0.1)
    planner = Planner(model, build.loss, build.optimizer, build.target)
    best = Selector(table, candidates, planner).best(Limits())
    assert best.weights == dict.fromkeys(candidates.weights, 1.0)


def test_the_final_decides(tmp_path):
    """Not the sum of contributions, and not its first round: the best go on, and the last one's
    best wins."""
    build = build_of(MLP)
    model, _ = build.resolve()
    candidates = find_candidates(model)
    table = made_up(tmp_path, candidates, lambda key: 0.1)
    planner = Planner(model, build.loss, build.optimizer, build.target)
    choices = [c for _, c in Selector(table, candidates, planner).finalists(Limits())]
    assert len(choices) > ROUNDS[-1].keep
    gains = {id(c): [0.1 * place] for place, c in enumerate(choices)}
    left = choices
    for place, this in enumerate(ROUNDS):
        left = sorted(left, key=lambda c: -gains[id(c)][-1])[: this.keep]
        for number, choice in enumerate(left):
            assert not judged(table, choices) and winner(table, choices) == 0
            gain = gains[id(choice)][0] if place == 0 else 0.1 * (number + 1)
            table.add(Row(*key_of(choice, this.kind), gain))
            gains[id(choice)] += [gain] if place else []
    assert judged(table, choices)
    assert choices[winner(table, choices)] is left[-1]
    assert all(gains_of(table, c) == gains[id(c)] for c in choices)
    assert len(gains_of(table, left[0])) == 3 and len(gains_of(table, choices[0])) < 3


def test_an_embedding_that_is_the_classifier_need_not_learn(tmp_path):
    """Its gradient goes through the whole model: the last norm is what always learns."""
    source = resolve_model("llama:depth=2,dim=16,heads=2,kv=1,hidden=24,vocab=20,tokens=6", batch=4)
    ids = np.random.default_rng(0).integers(0, 20, (40, 7)).astype(np.int32)
    build = Build.of(
        source.module, source.example_inputs, loss=source.loss, optimizer="adam",
        samples={"ids": ids[:, :-1].copy(), "y": ids[:, 1:].copy()}, analysis=tmp_path / "t.jsonl",
        published=source.scheme, name=source.name,
    )  # fmt: skip
    candidates = find_candidates(build.resolve()[0])
    assert candidates.head == {"n.weight": 1} and "tok.weight" in candidates.weights
    assert set(candidates.biases("1")) == {"n.weight", "blocks.1.n1.weight", "blocks.1.n2.weight"}
    everything = search(build, settings=Settings(minutes=0.02))
    assert ("weight", "tok.weight", 0.25) in everything.table.rows
    smallest = Planner(candidates.model, build.loss, build.optimizer, build.target)
    last = {**Scheme.last().resolve(candidates.model)}
    assert smallest.cost(candidates.head).arena_bytes < smallest.cost(last).arena_bytes


# The table ---------------------------------------------------------------------------------------


def test_a_torn_line_is_dropped_and_the_rest_kept(tmp_path):
    path = tmp_path / "a" / "t.jsonl"
    table = Table.open(path, {"model": "m", "steps": 3}, ("steps",))
    table.add(Row("bias", "1", 1.0, 0.5))
    table.add(Row("weight", "w", 0.5, 0.25))
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"kind": "wei')
    again = Table.open(path, {"model": "m", "steps": 9}, ("steps",))
    assert again.rows == table.rows and again.facts["steps"] == 3
    assert path.read_bytes() == whole
    with pytest.raises(PockError, match="something else"):
        Table.open(path, {"model": "other"}, ())
    path.write_text("{}\n")
    with pytest.raises(PockError, match="no analysis"):
        Table.read(path)
