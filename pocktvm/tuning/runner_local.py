"""Candidates in a killable child of this process."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

from pocktvm.tuning.runners import TIMEOUT_SECONDS, CandidateError


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
