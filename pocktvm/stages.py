"""Where a build is: progress for people, seconds for the manifest, dumps for debugging.

`POCKTVM_DUMP=dir` writes what every stage produced, numbered in order (`00_import.py`,
`01_differentiate_step.txt`, …) and `passes.txt`, a table of nodes and seconds per pass.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pocktvm.ir.graph import Graph


class Stages:
    """Tells an observer the stage, times it, and dumps its result."""

    def __init__(self, progress: Callable[[str, str], None] | None = None) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}
        self._current, self._since = "", time.perf_counter()
        self._dump = os.environ.get("POCKTVM_DUMP")
        self._number = 0
        self._passes: list[str] = []

    def enter(self, stage: str) -> None:
        """Begin the next stage; the one before ends."""
        self._close()
        self._current = stage
        self.detail("")

    def detail(self, text: str) -> None:
        """Tell what the stage is at."""
        if self.progress:
            self.progress(self._current, text)

    def _close(self) -> None:
        now = time.perf_counter()
        if self._current:
            self.seconds[self._current] = self.seconds.get(self._current, 0) + now - self._since
        self._since = now

    def finish(self) -> dict[str, float]:
        """Seconds of every stage, the last one included."""
        self._close()
        self._current = ""
        return dict(self.seconds)

    def saw(self, stage: str, *results: Any) -> None:
        """Dump what a stage produced, when asked to."""
        if not self._dump:
            return
        for result in results:
            text, suffix = _text(result)
            label = f"{stage}_{result.name}" if isinstance(result, Graph) else stage
            self._write(f"{self._number:02d}_{label}{suffix}", text)
            self._number += 1

    def saw_pass(self, index: int, name: str, graph: Graph) -> None:
        """Dump the graph after a pass, with a line in the table of passes."""
        self.detail(name)
        if not self._dump:
            return
        self.saw(f"pass{index:02d}_{name}", graph)
        nbytes = sum(graph.values[o].nbytes for n in graph.nodes for o in n.outputs)
        self._passes.append(
            f"{graph.name:8} {index:2d} {name:18} {len(graph.nodes):6d} nodes "
            f"{nbytes / 1e6:10.2f} MB computed  {time.perf_counter() - self._since:7.2f} s"
        )
        self._write("passes.txt", "\n".join(self._passes) + "\n")

    def _write(self, name: str, text: str) -> None:
        folder = Path(self._dump or ".")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def _text(result: Any) -> tuple[str, str]:
    if hasattr(result, "script"):
        return result.script(show_meta=True), ".py"
    return f"{result}\n", ".txt"
