"""Tuning records: the best knobs of a kernel on a target, in `tuning_logs/<target>/<rule>.json`.

Only the best record of a kernel is kept (about 200 bytes), keyed by a hash of the task's signature
and of the ISA facts it was tuned for. A changed shape, fusion or knob misses; `build` counts hits.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pocktvm.errors import PockError
from pocktvm.ir.target import Target
from pocktvm.schedule.rule import Knob, Rule, Task, unmasked
from pocktvm.tuning.logs import logs_dir


@dataclass(frozen=True)
class Record:
    """The outcome of tuning one kernel.

    seconds, default_seconds: medians of one interleaved comparison; when nothing beat the default,
    `knobs` are the default's and both are equal.
    """

    what: str
    knobs: Mapping[str, Any]
    seconds: float
    default_seconds: float
    trials: int
    versions: Mapping[str, str] = field(default_factory=dict)


def task_key(task: Task) -> str:
    """What a record is filed under: the task, and the facts of the machine it was tuned for."""
    facts = [task.signature, vars(task.target.isa), dict(task.target.tvm)]
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


class Records:
    """All records of one target."""

    def __init__(self, target: Target, folder: Path | None = None) -> None:
        self.folder = (folder or logs_dir()) / target.name
        self._rules: dict[str, dict[str, Record]] = {}

    def find(self, task: Task, rule: Rule) -> Record | None:
        """The record of a task under a rule, or else of the task without masks, if its knobs still
        exist."""
        records, plain = self._of(rule.name), unmasked(task)
        record = records.get(task_key(task))
        if record is None and plain is not None:
            record = records.get(task_key(plain))
        if record is None:
            return None
        known = rule.knobs(task)
        fits = set(record.knobs) == set(known) and all(
            _equal(record.knobs[name], _values(knob)) for name, knob in known.items()
        )
        return record if fits else None

    def knobs(self, task: Task, rule: Rule) -> dict[str, Any] | None:
        """Tuned knobs, or None (what KernelCompiler asks)."""
        record = self.find(task, rule)
        if record is None:
            return None
        options = rule.knobs(task)
        return {n: _option(v, _values(options[n])) for n, v in record.knobs.items()}

    def keep(self, task: Task, rule: Rule, record: Record) -> None:
        """Write a record at once, atomically. Raises PockError where the folder is read-only."""
        records = self._of(rule.name)
        records[task_key(task)] = record
        text = json.dumps({k: asdict(records[k]) for k in sorted(records)}, indent=1) + "\n"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.folder, prefix=".part")
            os.fchmod(handle, 0o644)  # records are shared, unlike temporary files
            with os.fdopen(handle, "w") as file:
                file.write(text)
            os.replace(name, self.folder / f"{rule.name}.json")
        except OSError as error:
            raise self._refused(error) from None

    def check_writable(self) -> None:
        """PockError where no record could be kept."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                return
        except OSError as error:
            raise self._refused(error) from None

    def _refused(self, error: OSError) -> PockError:
        return PockError(
            f"cannot write tuning records to {self.folder}: {error.strerror}.\n"
            "  Set POCKTVM_TUNING_LOGS to a folder you can write."
        )

    def _of(self, rule: str) -> dict[str, Record]:
        if rule not in self._rules:
            self._rules[rule] = self._read(self.folder / f"{rule}.json")
        return self._rules[rule]

    def _read(self, path: Path) -> dict[str, Record]:
        try:
            return {key: Record(**fields) for key, fields in json.loads(path.read_text()).items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError) as error:
            raise PockError(
                f"{path} is not a file of tuning records ({error}).\n"
                "  Remove it, or restore it from version control."
            ) from None


def _values(knob: Knob) -> tuple[Any, ...]:
    """What a knob may be: a default chosen by shape need not be among the options."""
    return (*knob.options, knob.default)


def _equal(value: Any, options: tuple[Any, ...]) -> bool:
    return json.dumps(value) in {json.dumps(o) for o in options}


def _option(value: Any, options: tuple[Any, ...]) -> Any:
    return next(o for o in options if json.dumps(o) == json.dumps(value))
