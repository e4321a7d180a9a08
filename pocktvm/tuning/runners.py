"""Where candidates run: a killable child of this process, or boards behind TVM's RPC tracker."""

from __future__ import annotations

import itertools
import json
import os
import re
import select
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pocktvm.errors import PockError
from pocktvm.ir.target import Target

TIMEOUT_SECONDS = 20.0


class CandidateError(Exception):
    """A candidate that crashed, hung or computed something else."""


class Runner(Protocol):
    """Times candidate folders; every task starts with `reset`."""

    def reset(self) -> None:
        """The next candidate timed is the one later ones must agree with."""

    def time(self, folder: Path) -> float:
        """Median seconds of a candidate. Raises CandidateError."""

    def compare(self, first: Path, second: Path) -> tuple[float, float]:
        """Median seconds of two candidates, interleaved."""

    def close(self) -> None:
        """Let go of processes and connections."""


class LocalRunner:
    """A child process on this machine, restarted after a crash or a hang."""

    def __init__(self, threads: int | None = None) -> None:
        self._threads = threads
        self._process: Any = None
        self._baseline: Path | None = None

    def reset(self) -> None:
        """Forget the outputs to agree with."""
        self._baseline = None
        if self._process is not None:
            self._ask({"reset": True})

    def time(self, folder: Path) -> float:
        """Median seconds; a child that dies or hangs is replaced and told the baseline again."""
        if self._process is None and self._baseline is not None:
            self._ask({"time": str(self._baseline)})
        seconds = self._ask({"time": str(folder)})["seconds"]
        self._baseline = self._baseline or folder
        return float(seconds)

    def compare(self, first: Path, second: Path) -> tuple[float, float]:
        """Both medians, from one child."""
        a, b = self._ask({"compare": [str(first), str(second)]})["seconds"]
        return float(a), float(b)

    def close(self) -> None:
        """End the child."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _start(self) -> Any:
        environment = dict(os.environ)
        if self._threads:
            environment["TVM_NUM_THREADS"] = str(self._threads)
        return subprocess.Popen(
            [sys.executable, "-m", "pocktvm.tuning.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        timeout = TIMEOUT_SECONDS
        if self._process is None:
            self._process = self._start()
            timeout *= 4  # importing TVM comes first
        try:
            self._process.stdin.write((json.dumps(request) + "\n").encode())
            self._process.stdin.flush()
            line = _read_line(self._process.stdout, timeout)
        except (BrokenPipeError, TimeoutError):
            line = b""
        if not line:
            self.close()
            raise CandidateError("the candidate crashed or hung")
        answer = json.loads(line)
        if "error" in answer:
            raise CandidateError(answer["error"])
        return answer


def _read_line(stream: Any, timeout: float) -> bytes:
    ready, _, _ = select.select([stream], [], [], timeout)
    if not ready:
        raise TimeoutError
    return stream.readline()


class RpcRunner:
    """Boards registered with a TVM tracker under one key; each candidate takes a free board."""

    def __init__(self, host: str, port: int, key: str) -> None:
        from pocktvm.tvm_api import rpc_module

        rpc = rpc_module()
        self._key, self._address = key, f"{host}:{port}"
        try:
            self._tracker = rpc.connect_tracker(host, port)
            servers = self._tracker.summary()["queue_info"].get(key, {"free": 0, "pending": 0})
        except (OSError, RuntimeError) as error:
            raise PockError(
                f"no RPC tracker at {self._address} ({error}).\n"
                "  Start one: python -m tvm.exec.rpc_tracker --host 0.0.0.0 --port "
                f"{port} --port-end {port + 1}"
            ) from None
        if not servers["free"] and not self._has_server():
            raise PockError(
                f"the tracker at {self._address} has no server with key '{key}'.\n"
                "  On the board: python -m tvm.exec.rpc_server --tracker "
                f"{self._address} --key {key}"
            )
        self._expected: list[np.ndarray] | None = None
        self._uploads = itertools.count()

    def _has_server(self) -> bool:
        info = self._tracker.summary().get("server_info", [])
        return any(f"server:{self._key}" in str(server.get("key")) for server in info)

    def reset(self) -> None:
        """Forget the outputs to agree with."""
        self._expected = None

    def time(self, folder: Path) -> float:
        """Median seconds on a board; a board that dies is left to the tracker."""
        from pocktvm.tuning.worker import check_equal

        def run(session: Any) -> float:
            call, outputs, seconds = self._open(session, folder)
            call()
            arrays = [o.numpy().copy() for o in outputs]
            if self._expected is None:
                self._expected = arrays
            for got, want in zip(arrays, self._expected, strict=True):
                check_equal(got, want)
            return seconds()

        return self._with_board(run)

    def compare(self, first: Path, second: Path) -> tuple[float, float]:
        """Both medians, on one board."""

        def run(session: Any) -> tuple[float, float]:
            timers = [self._open(session, folder)[2] for folder in (first, second)]
            times: tuple[list[float], list[float]] = ([], [])
            for _ in range(3):
                for timer, collected in zip(timers, times, strict=True):
                    collected.append(timer())
            return statistics.median(times[0]), statistics.median(times[1])

        return self._with_board(run)

    def close(self) -> None:
        """Nothing is held between candidates."""

    def _with_board(self, run: Any) -> Any:
        failure = ""
        for _ in range(3):
            try:
                session = self._tracker.request(
                    self._key, priority=1, session_timeout=TIMEOUT_SECONDS
                )
                return run(session)
            except ValueError as error:
                raise CandidateError(str(error)) from None
            except Exception as error:  # TVM's RPC raises many kinds for a board that is gone
                failure = f"{type(error).__name__}: {str(error)[:200]}"
        raise CandidateError(failure)

    def _open(self, session: Any, folder: Path) -> tuple[Any, list[Any], Any]:
        from pocktvm.tuning.calling import seeded_arguments
        from pocktvm.tuning.candidate import SYMBOL, Candidate
        from pocktvm.tvm_api import tvm

        candidate = Candidate(folder)
        facts = json.loads(candidate.description.read_text())
        # a name of its own each time: writing over a library that is loaded kills the server
        name = f"{folder.name}-{next(self._uploads)}.so"
        session.upload(str(candidate.library), name)
        library = session.load_module(name)
        device = session.cpu(0)
        tensors = [tvm.runtime.tensor(a, device) for a in seeded_arguments(facts)]
        function = library[SYMBOL]
        evaluator = library.time_evaluator(SYMBOL, device, number=3, repeat=5)
        first, count = facts["n_inputs"], facts["n_outputs"]
        return (
            lambda: function(*tensors),
            tensors[first : first + count],
            lambda: float(evaluator(*tensors).median),
        )


def open_runner(text: str, target: Target, threads: int | None = None) -> Runner:
    """A runner from `local` or `rpc://host:port/key`. Raises PockError with what is allowed."""
    if text == "local":
        if not target.is_host:
            raise PockError(
                f"--runner local times kernels on this machine, but the target is {target.name}.\n"
                "  Use --runner rpc://host:port/key with a board behind a TVM tracker."
            )
        return LocalRunner(threads)
    match = re.fullmatch(r"rpc://([\w.-]+):(\d+)/([\w.-]+)", text)
    if match:
        return RpcRunner(match[1], int(match[2]), match[3])
    raise PockError(f"unknown runner '{text}': use local, or rpc://host:port/key.")
