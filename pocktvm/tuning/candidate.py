"""One candidate: a task with knobs, compiled and linked into a library that can be timed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocktvm.codegen.link import target_flags, zig
from pocktvm.schedule.compile_kernel import compile_object
from pocktvm.schedule.rule import Rule, Task
from pocktvm.tvm_api import buffer_types

SYMBOL = "candidate"


@dataclass(frozen=True)
class Candidate:
    """A linked kernel and what it takes to call it (both files are in `folder`)."""

    folder: Path

    @property
    def library(self) -> Path:
        """The shared library that defines the kernel."""
        return self.folder / "candidate.so"

    @property
    def description(self) -> Path:
        """Path of its JSON: arguments, how many are inputs and outputs, packs."""
        return self.folder / "candidate.json"


def build_candidate(task: Task, rule: Rule, knobs: Mapping[str, Any], folder: Path) -> Candidate:
    """Emit, compile and link; the folder must exist and be the candidate's own."""
    emitted = rule.emit(task, dict(knobs))
    candidate = Candidate(folder)
    object_file = folder / "candidate.o"
    object_file.write_bytes(compile_object(emitted.func, SYMBOL, task))
    zig(
        [*target_flags(task.target.toolchain), "-shared", "-fPIC", "-o", candidate.library,
         object_file],
        "a candidate",
    )  # fmt: skip
    node = task.node
    description = {
        "args": buffer_types(emitted.func),
        "n_inputs": len(node.inputs),
        "n_outputs": len(node.outputs),
        "shapes": [list(task.shape(n)) for n in node.inputs],
        "pack": {str(i): [p.name, dict(p.params)] for i, p in emitted.pack.items()},
    }
    candidate.description.write_text(json.dumps(description))
    return candidate
