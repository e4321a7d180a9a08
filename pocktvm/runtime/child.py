"""Starts a trainer process that cannot outlive the one that started it."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys

_PR_SET_PDEATHSIG = 1
# Looked up here: between fork and exec only a call of what is already loaded is safe.
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def die_with_parent() -> None:
    """For `preexec_fn`: the kernel sends SIGKILL to this process when its parent ends."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def wait_for(command: list[str], *, capture: bool) -> tuple[int, str]:
    """Run to the end; exit code and, with `capture`, what it wrote to stdout.

    Ctrl-C reaches the child too, which then saves and ends: it is given the time to.
    """
    stdout = subprocess.PIPE if capture else None
    with subprocess.Popen(command, stdout=stdout, preexec_fn=die_with_parent) as child:
        while True:
            try:
                text, _ = child.communicate()
                return child.returncode, (text or b"").decode()
            except KeyboardInterrupt:
                continue
