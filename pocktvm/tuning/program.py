"""A candidate as a program of its own, for devices that have neither Python nor TVM.

It reads its inputs from stdin and writes the median nanoseconds of a call and the outputs
(runtime/c/time_kernel.c); it needs what every artifact needs, the device's libc.
"""

from __future__ import annotations

import json
import math
import statistics
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np

from pocktvm.codegen.link import link_timer
from pocktvm.codegen.tables import Shapes, array, dltype
from pocktvm.ir.target import Target, Toolchain
from pocktvm.tuning.calling import check_equal, seeded_arguments
from pocktvm.tuning.candidate import SYMBOL, Candidate
from pocktvm.tuning.runners import CandidateError

ROUNDS = 3  # of a comparison


def link_program(candidate: Candidate, toolchain: Toolchain) -> Path:
    """The candidate's program, linked once."""
    program = candidate.folder / "kernel"
    if not program.exists():
        facts = json.loads(candidate.description.read_text())
        (candidate.folder / "candidate.h").write_text(header(facts))
        link_timer(toolchain, candidate.folder, candidate.folder / "candidate.o", program)
    return program


def header(facts: dict[str, Any]) -> str:
    """The text of candidate.h: the kernel's name and its arguments."""
    shapes, rows = Shapes("candidate_shapes"), []
    for shape, dtype in facts["args"]:
        size = math.prod(shape) * np.dtype(dtype).itemsize
        rows.append(f"{{{size}, {len(shape)}, {shapes.add(shape)}, {dltype(dtype)}}}")
    name = f"__tvm_ffi_{SYMBOL}"
    return "\n".join(
        (
            f"int {name}(void *, const pk_any *, int32_t, pk_any *);",
            f"#define CANDIDATE {name}",
            f"enum {{ N_ARGS = {len(rows)}, N_INPUTS = {facts['n_inputs']}, "
            f"N_OUTPUTS = {facts['n_outputs']} }};",
            "typedef struct { int64_t nbytes; int32_t ndim; const int64_t *shape; "
            "pk_dltype dtype; } candidate_arg;",
            shapes.declaration(),
            array("candidate_arg", "candidate_args", rows),
        )
    )


def read_result(data: bytes, facts: dict[str, Any]) -> tuple[float, list[np.ndarray]]:
    """(median seconds, outputs) of what the program wrote. CandidateError: it is cut short."""
    line, _, rest = data.partition(b"\n")
    first, outputs = facts["n_inputs"], []
    for shape, dtype in facts["args"][first : first + facts["n_outputs"]]:
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if len(rest) < size:
            raise CandidateError("its result was cut short")
        outputs.append(np.frombuffer(rest[:size], dtype).reshape(shape))
        rest = rest[size:]
    try:
        return float(line) * 1e-9, outputs
    except ValueError:
        raise CandidateError("it wrote no time") from None


class ProgramRunner(ABC):
    """What runners of programs share: outputs that must agree, and comparisons that take turns."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._expected: list[np.ndarray] | None = None

    @abstractmethod
    def run_program(self, program: Path, inputs: bytes) -> tuple[float | None, bytes]:
        """(seconds where the program's own clock is not to be believed, what it wrote).

        Raises CandidateError."""

    def reset(self) -> None:
        """Forget the outputs to agree with."""
        self._expected = None

    def time(self, folder: Path) -> float:
        """Median seconds on the device."""
        seconds, outputs = self._run(folder)
        if self._expected is None:
            self._expected = outputs
        try:
            for got, want in zip(outputs, self._expected, strict=True):
                check_equal(got, want)
        except ValueError as error:
            raise CandidateError(str(error)) from None
        return seconds

    def compare(self, first: Path, second: Path) -> tuple[float, float]:
        """Both medians; the two take turns."""
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(ROUNDS):
            for folder, collected in zip((first, second), times, strict=True):
                collected.append(self._run(folder)[0])
        return statistics.median(times[0]), statistics.median(times[1])

    def close(self) -> None:  # noqa: B027 (most have nothing to let go of)
        """Nothing is held between candidates."""

    def _run(self, folder: Path) -> tuple[float, list[np.ndarray]]:
        candidate = Candidate(folder)
        facts = json.loads(candidate.description.read_text())
        program = link_program(candidate, self._target.toolchain)
        inputs = b"".join(a.tobytes() for a in seeded_arguments(facts)[: facts["n_inputs"]])
        seconds, written = self.run_program(program, inputs)
        told, outputs = read_result(written, facts)
        return (told if seconds is None else seconds), outputs
