"""`pocktvm scheme` from end to end: stopped, killed, gone on with, and given bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from search_case import CNN, MLP, build_of, clouds
from typer.testing import CliRunner
from waiting import wait_until

import pocktvm
from pocktvm.cli.app import app
from pocktvm.frontend.resolve import resolve_model
from pocktvm.ir.scheme import Scheme
from pocktvm.search.auto import search
from pocktvm.search.finals import ROUNDS
from pocktvm.search.study import checked_samples
from pocktvm.search.table import Table

pytestmark = pytest.mark.build


@pytest.fixture
def data(tmp_path):
    x, y = clouds()
    np.savez(tmp_path / "data.npz", x=x, y=y)
    return tmp_path / "data.npz"


def facts_shares(table):
    return json.loads(table.read_text().splitlines()[0])["tried_shares"]


def run(*arguments):
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    return done, done.output + (done.stderr if done.stderr_bytes else "")


@pytest.mark.parametrize("method", ["finetune", "fisher", "grad-norm"])
def test_scheme_then_build(tmp_path, data, method):
    table, toml = tmp_path / "t.jsonl", tmp_path / "s.toml"
    common = ("--data", data, "--method", method, "--minutes", 0.05, "--lr", 0.01)
    done, text = run("scheme", MLP, *common, "--analysis", table, "-o", toml, "--json")
    assert done.exit_code == 0, text
    facts = json.loads(done.stdout)
    trained = {(f["bias_depth"], *sorted(f["weights"].items())): f for f in facts["finalists"]}
    gains = [f["trained_gains"] for f in trained.values()]
    held = [sum(len(g) > place for g in gains) for place in range(len(ROUNDS))]
    assert held == [min(len(gains), r.keep or len(gains)) for r in ROUNDS]
    assert facts["trials"] == 5 + 4 * len(facts_shares(table)) + sum(held)
    assert facts["chosen"] in facts["frontier"]
    last = [g[-1] for g in gains if len(g) == len(ROUNDS)]
    best = next(f for f in trained.values() if f["trained_gains"][-1] == max(last))
    assert best["weights"] == facts["chosen"]["weights"] and len(last) >= 2
    for place in (1, 2):  # the best went on
        before = sorted((g[place - 1] for g in gains if len(g) >= place), reverse=True)
        entered = sorted((g[place - 1] for g in gains if len(g) > place), reverse=True)
        assert entered == before[: len(entered)]
    assert Scheme.from_toml(toml).mapping == facts["scheme"]
    limit = (3 * facts["plan_bytes"] + facts["frontier"][0]["total_bytes"]) // 4
    before = table.read_text()
    done, text = run("scheme", MLP, *common, "--analysis", table, "--budget", limit, "--json")
    assert done.exit_code == 0 and table.read_text().startswith(before)
    more = [json.loads(line)["kind"] for line in table.read_text()[len(before) :].splitlines()]
    # another budget has other finalists, but no new trials
    assert set(more) <= {r.kind for r in ROUNDS}
    smaller = json.loads(done.stdout)
    assert smaller["plan_bytes"] <= limit < facts["plan_bytes"]
    done, text = run(
        "build", MLP, "--scheme", "auto", "--analysis", table, "--budget", limit,
        "--optimizer", "adam", "-o", tmp_path / "artifact", "--json",
    )  # fmt: skip
    assert done.exit_code == 0, text
    built = json.loads(done.stdout)
    assert built["scheme"] == "auto"
    assert built["plan"]["total_bytes"] == smaller["plan_bytes"]
    assert set(smaller["scheme"]) == set(built["updated"])


def test_a_stopped_analysis_goes_on_and_ends_the_same(tmp_path):
    x, y = clouds()
    build, path = build_of(MLP, samples={"x": x, "y": y}), tmp_path / "t.jsonl"
    seen = []

    def stop_after_five(stage, detail=""):
        seen.append(stage)
        if seen.count("try candidates") == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(replace(build, analysis=path), progress=stop_after_five)
    kept = Table.read(path).rows
    assert len(kept) == 5
    tried = []
    found = search(replace(build, analysis=path), progress=lambda s, d="": tried.append((s, d)))
    assert not any(stage == "compile kernels" for stage, _ in tried)  # the artifact was kept
    assert next(d.partition(",")[0] for s, d in tried if s == "try candidates") == "6/21"
    assert len([r for r in found.table.rows.values() if "joint" not in r.kind]) == 21
    assert all(found.table.rows[key] == row for key, row in kept.items())
    whole = search(replace(build, analysis=tmp_path / "other.jsonl")).table.rows
    for key, row in found.table.rows.items():  # unless the pace, thus the steps, came out otherwise
        if found.table.facts["steps"] == Table.read(tmp_path / "other.jsonl").facts["steps"]:
            assert whole[key].gain == row.gain


@pytest.mark.slow
def test_a_killed_analysis_goes_on(tmp_path):
    x, y = clouds(2000)
    np.savez(tmp_path / "data.npz", x=np.tile(x.reshape(2000, 1, 20), (1, 3, 30)).reshape(
        2000, 3, 20, 30)[:, :, :12, :12], y=y)  # fmt: skip
    table = tmp_path / "killed.jsonl"
    command = [
        sys.executable, "-m", "pocktvm", "scheme", CNN, "--data", str(tmp_path / "data.npz"),
        "--minutes", "2", "--analysis", str(table), "--json",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_until(lambda: table.is_file() and table.read_bytes().count(b"\n") >= 4, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    kept = Table.read(table).rows
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = Table.read(table).rows
    assert 3 <= len(kept) < len(rows) == json.loads(done.stdout)["trials"]
    assert all(rows[key] == row for key, row in kept.items())


def test_compile_takes_samples_for_auto(tmp_path):
    x, y = clouds()
    source = resolve_model(MLP, batch=8)
    artifact = pocktvm.compile(
        source.module, source.example_inputs, scheme="auto", samples={"x": x, "y": y},
        optimizer=pocktvm.SGD(lr=0.05), analysis=tmp_path / "t.jsonl",
    )  # fmt: skip
    assert {"fc.weight", "fc.bias"} <= set(artifact.updated)
    with artifact.load() as trainer:
        first = trainer.step(x[:8], y[:8])
        assert [trainer.step(x[:8], y[:8]) for _ in range(5)][-1] < first


# Bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, ("--budget", "10kB"), "below the smallest plan"),
        ({}, ("--only", "blocks.9.weight"), "matches none"),
        ({"x": np.zeros((40, 7), np.float32)}, (), "shape"),
        ({"y": np.zeros(200, np.int64)}, (), "one class"),
        ({"x": np.zeros((0, 20), np.float32), "y": np.zeros(0, np.int64)}, (), "0 samples"),
        ({"x": np.zeros((9, 20), np.float32), "y": np.arange(9) % 2}, (), "9 samples"),
        ({"y": np.full(200, 99)}, (), "99"),
    ],
)
def test_bad_input_is_one_message_and_exit_1(tmp_path, change, options, message):
    x, y = clouds()
    np.savez(tmp_path / "bad.npz", **({"x": x, "y": y} | change))
    done, text = run("scheme", MLP, "--data", tmp_path / "bad.npz", *options)
    assert done.exit_code == 1, text
    assert message in text and len(text.splitlines()) <= 25
    assert "Traceback" not in text


def test_missing_data_and_wrong_words(tmp_path, data):
    done, text = run("scheme", MLP, "--data", tmp_path / "none.npz")
    assert done.exit_code == 1 and "no data at" in text
    assert run("scheme", MLP)[0].exit_code == 2
    assert run("scheme", MLP, "--data", data, "--method", "guess")[0].exit_code == 2
    assert run("scheme", MLP, "--data", data, "--budget", "lots")[0].exit_code == 2
    done, text = run("build", MLP, "--scheme", "auto")
    assert done.exit_code == 1 and "--data" in text
    done, text = run("build", MLP, "--scheme", '{"fc.weight": "activation:0.5"}')
    assert done.exit_code == 1 and "--data" in text
    (tmp_path / "t.jsonl").write_text("what\n")
    done, text = run("build", MLP, "--scheme", "auto", "--analysis", tmp_path / "t.jsonl")
    assert done.exit_code == 1 and "no analysis" in text


def test_samples_of_two_batches_are_enough():
    build = build_of(MLP)
    model, _ = build.resolve()
    x, y = clouds(16)
    assert set(checked_samples(build, model, {"x": x, "y": y})) == {"x", "y"}
