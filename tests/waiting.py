"""Waiting for what another process does. The deadline only catches what hangs: no test depends on
how fast the machine is, which others may be using."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable

PATIENCE = 240.0  # seconds


def wait_until(
    condition: Callable[[], object], process: subprocess.Popen | None = None, every: float = 0.02
) -> None:
    """Return once `condition` holds; fail when `process` ends before, or after PATIENCE."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if process is not None and process.poll() is not None and not condition():
            raise AssertionError(f"ended with {process.returncode} before what was waited for")
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(every)
