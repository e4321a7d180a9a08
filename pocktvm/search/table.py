"""The analysis on disk: a line of facts, then a line a candidate, each complete before the next.

JSON lines, appended and synced: an analysis that was killed goes on behind the last whole line.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pocktvm.errors import PockError
from pocktvm.files import write_whole


@dataclass(frozen=True)
class Row:
    """One candidate's contribution.

    kind   "bias" (biases of the last `name` blocks) or "weight" (the tensor `name`, `share` of it)
    gain   of held-out loss against the classifier alone (finetune), or the proxy's score
    """

    kind: str
    name: str
    share: float
    gain: float
    seconds: float = 0.0

    @property
    def key(self) -> tuple[str, str, float]:
        """What was tried, as `Candidates.keys` has it."""
        return self.kind, self.name, self.share


class Table:
    """Rows by candidate, in the order they were measured."""

    def __init__(self, path: Path, facts: Mapping[str, Any], rows: list[Row]) -> None:
        self.path, self.facts = path, dict(facts)
        self.rows = {row.key: row for row in rows}

    @classmethod
    def read(cls, path: Path) -> Table:
        """The table of a file. PockError: there is none, or it is not an analysis."""
        if not path.is_file():
            raise PockError(f"no analysis at {path}; `pocktvm scheme MODEL --data F` makes one.")
        lines = path.read_bytes().split(b"\n")
        try:
            facts = json.loads(lines[0])
            if facts.pop("pocktvm") != "analysis":
                raise ValueError("another file of pocktvm's")
            rows = [Row(**json.loads(line)) for line in lines[1:-1]]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PockError(f"{path} is no analysis of pocktvm's ({error}): remove it.") from error
        return cls(path, facts, rows)

    @classmethod
    def open(cls, path: Path, facts: Mapping[str, Any], settled: tuple[str, ...]) -> Table:
        """Go on with the table at `path`, or begin one with these facts.

        `settled` are facts that an existing table decides. PockError when any other differs.
        """
        if not path.is_file() or b"\n" not in path.read_bytes():
            path.parent.mkdir(parents=True, exist_ok=True)
            head = json.dumps({"pocktvm": "analysis", **facts}) + "\n"
            write_whole(path, head, "the analysis")
            return cls(path, facts, [])
        table = cls.read(path)
        wrong = [k for k, v in facts.items() if k not in settled and table.facts.get(k) != v]
        if wrong:
            raise PockError(
                f"{path} analyses something else: it has {wrong[0]} = "
                f"{table.facts.get(wrong[0])!r}, this is {facts[wrong[0]]!r}.\n"
                "  Name another file (--analysis), or remove this one."
            )
        whole = path.read_bytes()
        end = whole.rfind(b"\n") + 1
        if end < len(whole):  # a line that was being written when the process ended
            with path.open("rb+") as file:
                file.truncate(end)
        return table

    def add(self, row: Row) -> None:
        """Append a row; it is on the disk when this returns."""
        self.rows[row.key] = row
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(row)) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def missing(self, keys: list[tuple[str, str, float]]) -> list[tuple[str, str, float]]:
        """Candidates not measured yet."""
        return [key for key in keys if key not in self.rows]


def digest(arrays: Mapping[str, Any]) -> str:
    """A short hash of named arrays."""
    found = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        found.update(f"{name} {array.dtype} {array.shape}\n".encode())
        found.update(array.reshape(-1).view(np.uint8).data)
    return found.hexdigest()[:16]
