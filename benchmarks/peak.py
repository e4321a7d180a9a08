"""The roof of this machine, measured: its FMA peak and what it reads from memory."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
WIDTHS = (16, 32, 64)  # bytes: NEON, AVX2, AVX-512; a width the machine lacks is only slower


def fma_peak_gflops(threads: int) -> float:
    """GFLOP/s of fused multiply-adds on registers with `threads` threads; takes about 3 seconds."""
    return max(_measure("peak.c", threads, f"-DVEC={width}") for width in WIDTHS)


def read_gbytes(threads: int) -> float:
    """GB/s that `threads` threads read from arrays far larger than the caches."""
    return _measure("bandwidth.c", threads)


def _measure(source: str, threads: int, *flags: str) -> float:
    """What a program of this folder prints."""
    with tempfile.TemporaryDirectory(prefix="pocktvm-peak-") as folder:
        program = Path(folder) / "measure"
        options = ["-O3", "-march=native", "-ffp-contract=fast", *flags, "-lpthread"]
        compiler = [sys.executable, "-m", "ziglang", "cc"]
        subprocess.run([*compiler, *options, str(HERE / source), "-o", str(program)], check=True)
        done = subprocess.run([program, str(threads)], capture_output=True, text=True, check=True)
        return float(done.stdout)
