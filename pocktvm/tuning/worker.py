"""The local worker: a child that calls candidates, so that a crash or a hang kills only itself.

Reads one JSON request a line, answers one JSON object a line. Requests:
`{"time": folder}` -> `{"seconds": median, "digest": …}`, where the first candidate timed is the one
every later one's outputs are compared with; `{"compare": [folder, folder]}` -> medians of both,
interleaved.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from pocktvm.tuning.calling import check_equal, prepare, time_call
from pocktvm.tuning.candidate import Candidate


class Worker:
    """Holds the outputs that candidates must reproduce."""

    def __init__(self) -> None:
        from pocktvm.tvm_api import tvm

        self._load = tvm.runtime.load_module
        self._tensor = tvm.runtime.tensor
        self._expected: list[np.ndarray] | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer one request; times are seconds a call.

        `reset` forgets the expected outputs, `time` (a folder) checks and times a candidate,
        `compare` (two folders) times two by turns.
        """
        if "reset" in request:
            self._expected = None
            return {}
        if "time" in request:
            call, outputs = self._open(request["time"])
            call()
            self._verify(outputs)
            return {"seconds": statistics.median(time_call(call))}
        first, second = (self._open(folder)[0] for folder in request["compare"])
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(5):
            times[0].extend(time_call(first, 0.1))
            times[1].extend(time_call(second, 0.1))
        return {"seconds": [statistics.median(t) for t in times]}

    def _open(self, folder: str) -> tuple[Any, list[Any]]:
        candidate = Candidate(Path(folder))
        library = self._load(str(candidate.library))
        return prepare(library, candidate.description, self._tensor)

    def _verify(self, outputs: list[Any]) -> None:
        arrays = [o.numpy().copy() for o in outputs]
        if self._expected is None:
            self._expected = arrays
        for got, want in zip(arrays, self._expected, strict=True):
            check_equal(got, want)


def main() -> None:
    """Serve requests until stdin closes."""
    # Only answers go to the real stdout: libraries print where they like.
    answers: TextIO = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        try:
            answer = worker.answer(json.loads(line))
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"[:500]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
