"""Candidates on boards behind TVM's RPC tracker."""

from __future__ import annotations

import itertools
import json
import socket
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from pocktvm.errors import PockError
from pocktvm.tuning.calling import check_equal
from pocktvm.tuning.runners import TIMEOUT_SECONDS, CandidateError

CONNECT_SECONDS = 5.0


class RpcRunner:
    """Boards registered with a TVM tracker under one key; each candidate takes a free board."""

    def __init__(self, host: str, port: int, key: str) -> None:
        from pocktvm.tvm_api import rpc_module

        rpc = rpc_module()
        self._key, self._address = key, f"{host}:{port}"
        try:
            # TVM's own client would try for a minute
            socket.create_connection((host, port), CONNECT_SECONDS).close()
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
