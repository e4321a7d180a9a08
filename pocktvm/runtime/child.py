"""Starts a trainer process that cannot outlive the one that started it."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1
# Looked up here: between fork and exec only a call of what is already loaded is safe.
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def die_with_parent() -> None:
    """For `preexec_fn`: the kernel sends SIGKILL to this process when its parent ends."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def wait_for(command: list[str], on_message: Callable[[str], None]) -> tuple[int, str]:
    """Run to the end; its exit code and its stdout. `on_message` gets its stderr line by line.

    Ctrl-C reaches the child too, which then saves and ends: it is given the time to.
    """
    with (
        tempfile.TemporaryFile() as out,
        subprocess.Popen(
            command, stdout=out, stderr=subprocess.PIPE, preexec_fn=die_with_parent
        ) as child,
    ):
        assert child.stderr is not None
        ended = False
        while not ended:
            with contextlib.suppress(KeyboardInterrupt):
                for line in child.stderr:
                    on_message(line.decode(errors="replace").rstrip("\n"))
                child.wait()
                ended = True
        out.seek(0)
        return child.returncode, out.read().decode()
