"""Channels chosen while a model trains: exact, resumable, in the memory of a fixed choice."""

from __future__ import annotations

import json
import subprocess

import numpy as np
import pytest
import torch
from equality import Work
from safetensors.numpy import load_file, save_file
from slices import KINDS, OPTIMIZERS, ZOO, Narrow, interpret, kinds, parts_of, rows
from torch import nn

import pocktvm
from pocktvm import memory
from pocktvm.autodiff.differentiate import differentiate
from pocktvm.autodiff.losses import parse_loss
from pocktvm.errors import PockError
from pocktvm.ir.part import Part, selectable
from pocktvm.passes import run_passes
from pocktvm.reference import evaluate

pytestmark = pytest.mark.build

OTHERS = {
    "plain.weight": [1, 2],
    "norm.weight": [0, 3, 6, 7],
    "depth.weight": [1, 3, 7],
    "up.weight": [2, 3, 11, 15],
    "line.weight": [1, 4, 7],
    "right": [5, 6, 7],
    "fc.weight": [0, 4],
    "fc.bias": [1],
}


def drawn(updated, seed):
    rng = np.random.default_rng(seed)
    return {
        n: np.sort(rng.choice(p.extent, len(p.indices), replace=False)).astype(np.int32)
        for n, p in updated.items()
        if isinstance(p, Part) and p.selectable
    }


def step_graph(module, inputs, scheme, optimizer, resample=True):
    model, updated = parts_of(module, inputs, scheme)
    updated = selectable(model, updated) if resample else updated
    step, _ = differentiate(model, updated, parse_loss("cross_entropy"), optimizer)
    return run_passes(step), updated


def test_every_table_of_a_compiled_step_follows_the_selection():
    """Given B at run time, a step compiled with A is the step compiled with B."""
    module, inputs, labels = kinds()
    optimizer = OPTIMIZERS["sgd"][0]
    ours, updated = step_graph(module, inputs, KINDS, optimizer)
    fixed = {"grouped.weight", "twice.weight"}
    assert {n for n, p in updated.items() if isinstance(p, Part) and not p.selectable} == fixed
    chosen = drawn(updated, 5)
    assert any(list(chosen[n]) != list(updated[n].indices) for n in chosen)
    given = {
        n: f"{'out:' if n in ('line.weight', 'fc.weight') else ''}{json.dumps(i.tolist())}"
        for n, i in chosen.items()
    }
    scheme = {**KINDS, **given}
    theirs, again = step_graph(module, inputs, scheme, optimizer, resample=False)
    assert all(tuple(chosen[n]) == again[n].indices for n in chosen)
    batch = {ours.inputs[0]: inputs[0].numpy(), "y": labels.numpy().astype(np.int32)}
    params = {f"selection/{n}": i for n, i in chosen.items()}
    mine = evaluate(ours, batch, params=params, lr=0.05, t=1, keep=False)
    _, state = interpret(theirs, batch, 0.05, steps=1)
    for name, param in ours.params.items():
        if param.kind == "selection":
            assert name not in mine.updates
            continue
        value = param.in_torch(mine.updates.get(name, param.value))
        assert np.allclose(value, state[name], rtol=1e-5, atol=1e-6), name


def planned_models():
    torch.manual_seed(0)
    yield Narrow(), (torch.randn(4, 32, 8, 8),), {"blocks.*.weight": 0.25, "fc.*": 1}
    for spec, (scheme, _) in ZOO.items():
        work = Work.of(spec, 2)
        yield work.source.module, work.source.example_inputs, scheme


def test_the_plan_grows_by_the_tables_alone():
    for module, inputs, scheme in planned_models():
        sizes = []
        for resample in (False, True):
            step, updated = step_graph(module, inputs, scheme, pocktvm.Adam(), resample)
            sizes.append(memory.estimate([step]).arena_bytes)
        tables = [64 * -(-len(p.indices) // 16) for p in updated.values() if isinstance(p, Part)]
        assert tables and sizes[1] - sizes[0] <= sum(tables)


@pytest.fixture(scope="module", params=["sgd", "adam"])
def trained(request, tmp_path_factory):
    module, inputs, _ = kinds()
    ours, make = OPTIMIZERS[request.param]
    artifact = pocktvm.compile(
        module, inputs, scheme={**KINDS, "fc.bias": 1}, optimizer=ours, resample=True,
        out=tmp_path_factory.mktemp("resample") / request.param,
    )  # fmt: skip
    return artifact, make


def masked_torch(module, inputs, labels, make, plan):
    """Full backprop; after every step what is not chosen is undone, its optimizer state is zero.
    `plan`: (steps, tensor -> indices of an axis, or None for all of it)."""
    names = dict(module.named_parameters())
    optimizer = make([names[n] for n in plan[0][1]])
    losses, states = [], []
    for steps, chosen in plan:
        for _ in range(steps):
            before = {n: p.detach().clone() for n, p in names.items()}
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(module(*inputs), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            with torch.no_grad():
                for name, part in chosen.items():
                    mask = torch.zeros_like(names[name], dtype=torch.bool)
                    mask[... if part is None else part] = True
                    names[name].copy_(torch.where(mask, names[name], before[name]))
                    for value in optimizer.state[names[name]].values():
                        if torch.is_tensor(value) and value.shape == mask.shape:
                            value.mul_(mask)
        states.append({n: p.detach().numpy().copy() for n, p in names.items()})
    return losses, states


def masks(updated, chosen):
    """Tensor -> the index that picks what learns."""
    found = {}
    for name, part in updated.items():
        if not isinstance(part, Part):
            found[name] = None
        elif part.selectable:
            found[name] = (slice(None),) * part.axis + (list(chosen[name]),)
        else:
            found[name] = rows(part)
    return found


def test_a_change_of_channels_is_torchs_masked_training(trained):
    artifact, make = trained
    module, inputs, labels = kinds()
    others = {n: v for n, v in OTHERS.items() if n != "fc.bias"}
    with artifact.load() as trainer:
        first = trainer.selection
        model, updated = parts_of(module, inputs, {**KINDS, "fc.bias": 1})
        updated = selectable(model, updated)
        assert first == {n: list(updated[n].indices) for n in others}
        x, y = inputs[0].numpy(), labels.numpy()
        losses = [trainer.step(x, y) for _ in range(3)]
        middle = trainer.state_dict()
        trainer.select({n: v[::-1] for n, v in others.items()})
        assert trainer.selection == others
        losses += [trainer.step(x, y) for _ in range(3)]
        end = trainer.state_dict()
    plan = [(3, masks(updated, first)), (3, masks(updated, others))]
    start = {n: p.detach().numpy().copy() for n, p in module.named_parameters()}
    theirs, (their_middle, their_end) = masked_torch(module, inputs, labels, make, plan)
    assert np.allclose(losses, theirs, rtol=2e-4)
    stages = [(start, middle, plan[0][1]), (middle, end, plan[1][1])]
    for (was, now, chosen), torchs in zip(stages, (their_middle, their_end), strict=True):
        for name, before in was.items():
            moved = np.zeros(before.shape, bool)
            if name in chosen:
                moved[... if chosen[name] is None else chosen[name]] = True
            assert np.array_equal(now[name][~moved], before[~moved]), f"{name}: frozen, changed"
            assert not moved.any() or not np.array_equal(now[name][moved], before[moved]), name
            gap = np.abs(now[name] - torchs[name]).max()
            assert gap <= 4e-4 * max(1e-2, np.abs(torchs[name]).max()), f"{name}: {gap}"


def test_resuming_brings_the_selection_and_is_bit_equal(trained, tmp_path):
    artifact, _ = trained
    _, inputs, labels = kinds()
    x, y = inputs[0].numpy(), labels.numpy()
    with artifact.load() as whole, artifact.load() as again:
        for seed in (3, 4):
            whole.step(x, y)
            whole.resample(seed)
            whole.step(x, y)
        whole.save(tmp_path / "a.safetensors")
        again.load(tmp_path / "a.safetensors")
        assert again.selection == whole.selection
        for trainer, name in ((whole, "b"), (again, "c")):
            trainer.step(x, y)
            trainer.resample(9)
            trainer.step(x, y)
            trainer.save(tmp_path / f"{name}.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "c.safetensors").read_bytes()


def test_state_stays_with_its_channels(trained):
    artifact, _ = trained
    facts = json.loads((artifact.path / "manifest.json").read_text())["tensors"]
    _, inputs, labels = kinds()
    with artifact.load() as trainer:
        for _ in range(2):
            trainer.step(inputs[0].numpy(), labels.numpy())
        for seed in range(6):
            old, before = trainer.selection, trainer.optimizer_state()
            trainer.resample(seed)
            new, after = trainer.selection, trainer.optimizer_state()
            for name, value in after.items():
                tensor = name.partition("/")[2]
                if tensor not in new:
                    assert np.array_equal(value, before[name])
                    continue
                axis = facts[f"selection/{tensor}"]["axis"]
                for j, channel in enumerate(new[tensor]):
                    mine = value.take(j, axis)
                    if channel in old[tensor]:
                        kept = before[name].take(old[tensor].index(channel), axis)
                        assert np.array_equal(mine, kept), (name, channel)
                    else:
                        assert not mine.any(), (name, channel)


def test_refusals_change_nothing(trained, tmp_path):
    artifact, _ = trained
    with artifact.load() as trainer:
        first = trainer.selection
        good = {"fc.weight": OTHERS["fc.weight"]}
        for bad, words in [
            ({"plain.weight": [0]}, "takes 2 different"),
            ({"plain.weight": [0, 0]}, "takes 2 different"),
            ({"plain.weight": [0, 3]}, "there is no 3"),
            ({"plain.weight": [-1, 2]}, "there is no -1"),
            ({"plain.weight": [0.5, 1]}, "takes 2 different"),
            ({"grouped.weight": [0, 1]}, "no channels to choose"),
            ({"nobody.weight": [0, 1]}, "no channels to choose"),
        ]:
            with pytest.raises(PockError, match=words):
                trainer.select({**good, **bad})
            assert trainer.selection == first
        for indices in ([0], [0, 0], [0, 5], [-1, 2]):  # the library looks, too
            with pytest.raises(PockError, match=r"plain\.weight"):
                trainer._live().select("plain.weight", np.asarray(indices, np.int32))
        with pytest.raises(PockError, match="seed"):
            trainer.resample(-1)
        trainer.save(tmp_path / "a.safetensors")
        arrays = load_file(tmp_path / "a.safetensors")
        arrays["selection/plain.weight"] = np.asarray([1, 9], np.int32)
        facts = {"pocktvm": "1", "step": "0"}
        save_file(arrays, tmp_path / "b.safetensors", metadata=facts)
        with pytest.raises(PockError, match="index 9 is out of range"):
            trainer.load(tmp_path / "b.safetensors")
        assert trainer.selection == first


def test_the_runner_resamples_between_epochs_and_resumes(trained, tmp_path):
    artifact, _ = trained
    rng = np.random.default_rng(0)
    samples = {
        next(iter(artifact.identity.inputs)).name: rng.normal(size=(12, 3, 8, 8)).astype("f4"),
        "y": rng.integers(0, 5, 12).astype(np.int32),
    }
    save_file(samples, tmp_path / "d.safetensors")

    def run(*words):
        command = [artifact.path / "pocktvm-run", artifact.path, "--data", "d.safetensors", *words]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)

    run("--resample", "1", "--steps", "8", "--save", "whole")
    run("--resample", "1", "--steps", "3", "--save", "cut")  # the end of an epoch
    run("--resample", "1", "--steps", "5", "--resume", "cut", "--save", "cut")
    run("--resample", "1", "--steps", "8", "--resume", "cut", "--save", "cut")
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "cut").read_bytes()
    run("--steps", "8", "--save", "static")
    chosen = {n: load_file(tmp_path / n)["selection/plain.weight"] for n in ("whole", "static")}
    assert list(chosen["static"]) == KINDS["plain.weight"]
    assert (tmp_path / "whole").read_bytes() != (tmp_path / "static").read_bytes()


def test_fixed_artifacts_say_so(tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), (torch.randn(4, 6),)
    fixed = pocktvm.compile(model, x, scheme={"0.weight": 0.5}, out=tmp_path / "fixed")
    with fixed.load() as trainer:
        assert trainer.selection == {}
        for call in (lambda: trainer.select({"0.weight": [0, 1, 2]}), lambda: trainer.resample(1)):
            with pytest.raises(PockError, match="build it with --resample"):
                call()
    done = subprocess.run(
        [fixed.path / "pocktvm-run", fixed.path, "--resample", "1"], capture_output=True, text=True
    )
    assert done.returncode == 1 and "build it with --resample" in done.stderr
    chosen = pocktvm.compile(
        model, x, scheme={"0.weight": 0.5}, resample=True, out=tmp_path / "chosen"
    )
    with fixed.load() as one, chosen.load() as other:
        for trainer, foreign in ((one, other), (other, one)):
            foreign.save(tmp_path / "foreign.safetensors")
            with pytest.raises(PockError, match="with --resample and the other was not"):
                trainer.load(tmp_path / "foreign.safetensors")
    with pytest.raises(PockError, match="nothing to re-sample"):
        pocktvm.compile(model, x, scheme="full", resample=True, out=tmp_path / "none")


@pytest.mark.emulated
def test_behind_a_pipe_it_is_the_same(tmp_path):
    """Selections of an emulated artifact; the losses are this machine's."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(4, 6)
    y, losses, states = np.array([0, 2, 1, 1]), [], []
    for target in ("host", "rpi4"):
        artifact = pocktvm.compile(
            model, (x,), scheme={"0.weight": 0.5, "2.weight": "out:0.4"}, target=target,
            optimizer=pocktvm.SGD(lr=0.1, momentum=0.9), resample=True, out=tmp_path / target,
        )  # fmt: skip
        with artifact.load() as trainer:
            mine = [trainer.step(x.numpy(), y)]
            trainer.select({"0.weight": [4, 0, 2]})
            mine.append(trainer.step(x.numpy(), y))
            trainer.resample(11)
            mine += [trainer.step(x.numpy(), y) for _ in range(2)]
            states.append(trainer.selection)
            with pytest.raises(PockError, match=r"0\.weight"):
                trainer._live().select("0.weight", np.asarray([1, 1, 2], np.int32))
            losses.append(mine)
    assert states[0] == states[1] and states[0]["0.weight"] != [0, 2, 4]
    assert np.allclose(*losses, rtol=1e-4)
