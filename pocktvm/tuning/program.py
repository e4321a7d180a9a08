"""A candidate as a program of its own, for devices that have neither Python nor TVM.

It reads its inputs from stdin and writes the median nanoseconds of a call and the outputs
(runtime/c/time_kernel.c); it needs what every artifact needs, the device's libc.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from pocktvm.codegen.link import link_timer
from pocktvm.codegen.tables import Shapes, array, dltype
from pocktvm.ir.target import Toolchain
from pocktvm.tuning.candidate import SYMBOL, Candidate
from pocktvm.tuning.runners import CandidateError


def link_program(candidate: Candidate, toolchain: Toolchain) -> Path:
    """The candidate's program, linked once."""
    program = candidate.folder / "kernel"
    if not program.exists():
        facts = json.loads(candidate.description.read_text())
        (candidate.folder / "candidate.h").write_text(header(facts))
        link_timer(toolchain, candidate.folder, candidate.folder / "candidate.o", program)
    return program


def header(facts: dict[str, Any]) -> str:
    """candidate.h: the kernel's name and its arguments."""
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
