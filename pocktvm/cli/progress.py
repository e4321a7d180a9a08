"""A bar on stderr that names the stage; nothing at all where stderr is no terminal."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any


class Progress:
    """A bar that is called as (stage, detail), and gone at the end of its `with`:
    `with Progress() as bar: bar("compile kernels", "blocks.3.dw")`.
    """

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None

    @property
    def visible(self) -> bool:
        """Whether anybody sees the bar."""
        return self._bar is not None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar

            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                TextColumn("{task.fields[count]}"),
                TimeElapsedColumn(),
            )
            self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task("starting", total=None, count="")
        return self

    def __call__(self, stage: str, detail: str = "", done: int = 0, total: int = 0) -> None:
        """Show `stage` and what it is at; `done` of `total` where the end is known."""
        if self._bar is not None:
            self._bar.update(
                self._task, description=stage, completed=done, total=total or None, count=detail
            )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
