"""Tuning over TVM's RPC: a tracker with two servers on this machine, one of which dies."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest
from test_tuning import matmul_task
from waiting import wait_until

from pocktvm.tuning.candidate import build_candidate
from pocktvm.tuning.runner_rpc import RpcRunner

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def answers(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


def registered(port: int) -> int:
    from pocktvm.tvm_api import rpc_module

    summary = rpc_module().connect_tracker("127.0.0.1", port).summary()
    return summary["queue_info"].get("board", {}).get("free", 0)


@pytest.fixture
def board():
    """(port, servers): a tracker and two servers with the key `board`."""
    port = free_port()
    module = [sys.executable, "-m"]
    tracker = subprocess.Popen(
        [
            *module,
            "tvm.exec.rpc_tracker",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--port-end",
            str(port + 1),
        ]
    )
    wait_until(lambda: answers(port), every=0.5)
    servers = [
        subprocess.Popen(
            [*module, "tvm.exec.rpc_server", "--host", "127.0.0.1", "--port",
             str(first := free_port()),
             "--port-end", str(first + 1), "--tracker", f"127.0.0.1:{port}", "--key", "board"]
        )
        for _ in range(2)
    ]  # fmt: skip
    wait_until(lambda: registered(port) == 2, every=0.5)
    yield port, servers
    for process in (tracker, *servers):
        process.kill()
        process.wait()


def test_candidates_run_on_boards_and_a_dead_one_is_left_out(board, tmp_path):
    port, servers = board
    task = matmul_task()
    from pocktvm.schedule.compile_kernel import choose_rule
    from pocktvm.schedule.rule import defaults

    rule = choose_rule(task)
    candidate = build_candidate(task, rule, defaults(rule.knobs(task)), tmp_path)
    runner = RpcRunner("127.0.0.1", port, "board")
    assert 0 < runner.time(candidate.folder) < 1
    first, second = runner.compare(candidate.folder, candidate.folder)
    assert first > 0 and second > 0
    servers[0].kill()
    servers[0].wait()
    for _ in range(3):
        assert runner.time(candidate.folder) > 0
