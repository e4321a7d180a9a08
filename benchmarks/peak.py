"""The FMA peak of this machine, measured: what every rate here is a fraction of."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("peak.c")
WIDTHS = (16, 32, 64)  # bytes: NEON, AVX2, AVX-512; a width the machine lacks is only slower


def fma_peak_gflops(threads: int) -> float:
    """GFLOP/s of fused multiply-adds on registers with `threads` threads; takes about 3 seconds."""
    best = 0.0
    with tempfile.TemporaryDirectory(prefix="pocktvm-peak-") as folder:
        for width in WIDTHS:
            program = Path(folder) / f"peak{width}"
            flags = ["-O3", "-march=native", "-ffp-contract=fast", f"-DVEC={width}", "-lpthread"]
            compiler = [sys.executable, "-m", "ziglang", "cc"]
            subprocess.run([*compiler, *flags, str(SOURCE), "-o", str(program)], check=True)
            done = subprocess.run([program, str(threads)], capture_output=True, text=True)
            best = max(best, float(done.stdout))
    return best
