"""Tuning: records hit and miss as they should, a broken candidate costs only itself."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from pocktvm.errors import PockError
from pocktvm.ir.graph import Node, Value
from pocktvm.schedule.compile_kernel import KernelCompiler, choose_rule
from pocktvm.schedule.rule import Task, defaults
from pocktvm.targets import load_target
from pocktvm.tuning.records import Record, Records
from pocktvm.tuning.runner_local import LocalRunner
from pocktvm.tuning.runners import CandidateError, open_runner
from pocktvm.tuning.search import FAILED, Journal
from pocktvm.tuning.tune import Tunable, tune

pytestmark = pytest.mark.build


def matmul_task(m: int = 24, k: int = 32, n: int = 40) -> Task:
    values = {"a": Value("a", (m, k)), "b": Value("b", (k, n)), "c": Value("c", (m, n))}
    node = Node("matmul", ("a", "b"), ("c",), {"transpose_a": False, "transpose_b": False})
    return Task(node, values, {}, frozenset(), load_target("host"))


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.setenv("POCKTVM_TUNING_LOGS", str(tmp_path / "logs"))
    monkeypatch.setenv("POCKTVM_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_a_record_is_found_again_and_only_for_its_task(folders):
    task = matmul_task()
    rule = choose_rule(task)
    knobs = defaults(rule.knobs(task))
    record = Record("matmul", knobs, 1.0, 2.0, 3)
    Records(task.target).keep(task, rule, record)
    again = Records(task.target)
    assert again.find(task, rule) == record
    assert again.find(matmul_task(m=25), rule) is None
    other = replace(task.target, isa=replace(task.target.isa, vector_bytes=16))
    assert Records(other).find(replace(task, target=other), rule) is None
    compiled = KernelCompiler(knobs_for=again.knobs).compile(task)
    assert compiled.kernel.tuned


def test_damaged_records_are_named(folders):
    task = matmul_task()
    rule = choose_rule(task)
    path = folders / "logs" / "host" / f"{rule.name}.json"
    path.parent.mkdir(parents=True)
    path.write_text("{")
    with pytest.raises(PockError, match=str(path)):
        Records(task.target).find(task, rule)


def test_tuning_keeps_a_record_no_slower_than_the_default(folders):
    task = matmul_task()
    rule = choose_rule(task)
    runner = LocalRunner(threads=1)
    try:
        summary = tune([Tunable(task, rule, 1)], task.target, runner, trials=4)
        assert (summary.tuned, summary.left) == (1, 0)
        record = Records(task.target).find(task, rule)
        assert record is not None
        assert record.seconds <= record.default_seconds
        again = tune([Tunable(task, rule, 1)], task.target, runner, trials=4)
        assert (again.tuned, again.kept) == (0, 1)
    finally:
        runner.close()
    journals = list((folders / "cache" / "tuning" / "host").glob("*.jsonl"))
    assert len(journals) == 1
    assert all(json.loads(line)["seconds"] > 0 for line in journals[0].read_text().splitlines())


def test_a_journal_survives_a_torn_last_line(tmp_path):
    path = tmp_path / "j.jsonl"
    journal = Journal(path)
    journal.add("a", 1.0)
    journal.add("b", FAILED)
    with path.open("a") as file:
        file.write('{"knobs": "c", "sec')
    assert Journal(path).seconds == {"a": 1.0, "b": FAILED}


def test_a_candidate_that_crashes_is_an_error_and_the_runner_goes_on(tmp_path):
    runner = LocalRunner(threads=1)
    try:
        with pytest.raises(CandidateError):
            runner.time(tmp_path)  # there is nothing to load
        runner._process.kill()
        with pytest.raises(CandidateError):
            runner.time(tmp_path)
        with pytest.raises(CandidateError, match="Error"):
            runner.time(tmp_path)
    finally:
        runner.close()


@pytest.mark.parametrize(
    ("text", "target", "message"),
    [
        ("local", "rpi4", "--runner ssh://pi@host"),
        ("ssh://-oProxyCommand=x", "rpi4", "is no host"),
        ("ftp://x", "host", "unknown runner"),
        ("rpc://127.0.0.1:1/rpi4", "rpi4", "no RPC tracker"),
    ],
)
def test_runners_that_cannot_be_had_say_what_to_do(text, target, message):
    with pytest.raises(PockError, match=message):
        open_runner(text, load_target(target))
