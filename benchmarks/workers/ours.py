"""Our contestant: the artifact through the public Trainer. Imports neither torch nor TVM."""

from __future__ import annotations

import argparse

import numpy as np

import pocktvm
from benchmarks.workers.protocol import serve


def main() -> None:
    """Train one recorded batch again and again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact")
    parser.add_argument("batch", help="npz with x and y")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--lr", type=float, default=1e-3)
    options = parser.parse_args()
    with np.load(options.batch) as file:  # reads its zip on every access
        x, y = file["x"], file["y"]
    trainer = pocktvm.load(options.artifact, threads=options.threads)
    serve(lambda: trainer.step(x, y, lr=options.lr))


if __name__ == "__main__":
    main()
