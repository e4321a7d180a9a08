"""The protocol between the bench and its workers.

A worker prepares itself, prints a JSON line `{"ready": true, "losses": […], "rss_bytes": …}` after
its warm-up, then answers each line `N` on stdin by running N steps and printing the milliseconds
of each as a JSON list. It ends when stdin closes.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable

WARM_UP_STEPS = 3


def serve(step: Callable[[], float]) -> None:
    """Warm up, then time steps on request; `step` trains once and returns the loss."""
    losses = [float(step()) for _ in range(WARM_UP_STEPS)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"ready": True, "losses": losses, "rss_bytes": peak}), flush=True)
    for line in sys.stdin:
        times = []
        for _ in range(int(line)):
            start = time.perf_counter()
            step()
            times.append((time.perf_counter() - start) * 1e3)
        print(json.dumps(times), flush=True)
