"""The protocol between the bench and its workers.

A worker prepares itself, prints a JSON line `{"ready": true, "losses": […], "rss_bytes": …}` after
its warm-up, then answers each line `N` on stdin by running N steps and printing the milliseconds
of each as a JSON list. It ends when stdin closes.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

WARM_UP_STEPS = 3


def peak_rss_bytes() -> int:
    """VmHWM of this process (getrusage would count what its parent had before exec)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def serve(step: Callable[[], float]) -> None:
    """Warm up, then time steps on request; `step` trains once and returns the loss."""
    losses = [float(step()) for _ in range(WARM_UP_STEPS)]
    peak = peak_rss_bytes()
    print(json.dumps({"ready": True, "losses": losses, "rss_bytes": peak}), flush=True)
    for line in sys.stdin:
        times = []
        for _ in range(int(line)):
            start = time.perf_counter()
            step()
            times.append((time.perf_counter() - start) * 1e3)
        print(json.dumps(times), flush=True)
