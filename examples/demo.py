"""MobileNetV2 learns handwritten digits: compiled, trained, and measured beside PyTorch.

    make demo            (or: python examples/demo.py [--steps 200] [--scheme full])

The same weights, the same batches, the same trained tensors and the same Adam run in two processes
of their own: one holds the compiled library and numpy, the other PyTorch. A third trains the
Raspberry Pi 4's library under qemu, where qemu is installed. The images are scikit-learn's digits,
eight pixels wide, enlarged.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SIZE, BATCH, HELD_OUT = 64, 16, 288
MODEL = f"mobilenetv2:width=0.35,image={SIZE},classes=10"
OPTIMIZER = "adam"
FOLDER = Path("build/demo")


def main() -> int:
    """Build for both targets, train, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=282, help="282 are three epochs")
    parser.add_argument("--scheme", default="full")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--worker", choices=("pocktvm", "torch"), help=argparse.SUPPRESS)
    parser.add_argument("--artifact", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(work(options)))
        return 0
    write_digits(FOLDER / "digits.npz")
    artifacts = {target: build(target, options.scheme) for target in ("host", "rpi4")}
    ours = start(options, "pocktvm", artifacts["host"])
    theirs = start(options, "torch", artifacts["host"])
    compare(ours, theirs)
    emulate(options, artifacts["rpi4"], ours)
    return 0


def write_digits(path: Path) -> None:
    """1797 digits as uint8 RGB images of SIZE pixels, in a fixed random order."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = np.round(digits.images * 255 / 16).astype(np.uint8)
    factor = SIZE // small.shape[1]
    grey = small.repeat(factor, axis=1).repeat(factor, axis=2)
    order = np.random.default_rng(0).permutation(len(grey))
    path.parent.mkdir(parents=True, exist_ok=True)
    x = np.repeat(grey[order, None], 3, axis=1)
    np.savez(path, x=x, y=digits.target[order].astype(np.int64))


def build(target: str, scheme: str) -> Path:
    """`pocktvm build`, which prints the plan; a second time it is a no-op."""
    folder = FOLDER / target
    command = [sys.executable, "-m", "pocktvm", "build", MODEL, "--target", target]
    command += [
        "--scheme",
        scheme,
        "--batch",
        str(BATCH),
        "--optimizer",
        OPTIMIZER,
        "-o",
        str(folder),
    ]
    print(f"\n== {' '.join(command[2:])}", flush=True)
    subprocess.run(command, check=True)
    return folder


def start(options: argparse.Namespace, worker: str, artifact: Path, **changes: Any) -> dict:
    """One contestant in a process of its own."""
    wanted = {"steps": options.steps, "lr": options.lr, "threads": options.threads, **changes}
    words = [w for key, value in wanted.items() for w in (f"--{key}", str(value))]
    command = [sys.executable, __file__, "--worker", worker, "--artifact", str(artifact), *words]
    print(f"== training with {worker}: {artifact}", flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
    return json.loads(done.stdout)


def work(options: argparse.Namespace) -> dict[str, Any]:
    """A contestant's process: train over the images in order, then look at the held-out ones."""
    with np.load(FOLDER / "digits.npz") as data:
        x, y = data["x"], data["y"]
    prepare = with_pocktvm if options.worker == "pocktvm" else with_torch
    before = resident("VmRSS")
    step, predict = prepare(options)
    accuracy = [score(predict, x, y)]
    losses, times = [], []
    samples = len(x) - HELD_OUT
    for index in range(options.steps):
        start = index * BATCH % (samples - samples % BATCH)
        batch = x[start : start + BATCH], y[start : start + BATCH]
        since = time.perf_counter()
        losses.append(step(*batch))
        times.append((time.perf_counter() - since) * 1e3)
    peak = resident("VmHWM")
    accuracy.append(score(predict, x, y))
    return {
        "losses": losses,
        "step_ms": statistics.median(times),
        "accuracy": accuracy,
        "process_bytes": peak,
        "grown_bytes": peak - before,
    }


Step = Callable[[np.ndarray, np.ndarray], float]
Predict = Callable[[np.ndarray], np.ndarray]


def with_pocktvm(options: argparse.Namespace) -> tuple[Step, Predict]:
    """The artifact through the public API; nothing of torch or TVM is loaded."""
    import pocktvm

    trainer = pocktvm.load(options.artifact, threads=options.threads)
    return lambda x, y: trainer.step(x, y, lr=options.lr), trainer.predict


def with_torch(options: argparse.Namespace) -> tuple[Step, Predict]:
    """The same module, weights, trained tensors and normalisation in PyTorch."""
    import torch

    from pocktvm.frontend.resolve import resolve_model

    manifest = json.loads((options.artifact / "manifest.json").read_text())
    torch.set_num_threads(options.threads)
    module = resolve_model(MODEL, batch=BATCH).module.eval()
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in manifest["updated"])
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=options.lr)
    mean, scale = (
        torch.tensor(manifest["inputs"][0][key]).reshape(1, -1, 1, 1) for key in ("mean", "scale")
    )

    def images(x: np.ndarray) -> torch.Tensor:
        return (torch.from_numpy(x).float() - mean) * scale

    def step(x: np.ndarray, y: np.ndarray) -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = torch.nn.functional.cross_entropy(module(images(x)), torch.from_numpy(y))
        loss.backward()
        optimizer.step()
        return loss.item()

    def predict(x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return module(images(x)).numpy()

    return step, predict


def score(predict: Predict, x: np.ndarray, y: np.ndarray) -> float:
    """Accuracy on the held-out digits."""
    hits = 0
    for start in range(len(x) - HELD_OUT, len(x) - BATCH + 1, BATCH):
        chosen = predict(x[start : start + BATCH]).argmax(axis=1)
        hits += int((chosen == y[start : start + BATCH]).sum())
    return hits / HELD_OUT


def resident(key: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most so far; 0 where Linux does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    found = [line.split()[1] for line in lines if line.startswith(f"{key}:")]
    return int(found[0]) * 1024 if found else 0


def compare(ours: dict, theirs: dict) -> None:
    """The table of both runs."""
    gap = largest_gap(ours, theirs)
    rows = [
        ("one step, median", "step_ms", "{:.2f} ms", 1),
        ("memory, data and weights to the end", "grown_bytes", "{:.0f} MB", 1e-6),
        ("memory of the process at its peak", "process_bytes", "{:.0f} MB", 1e-6),
    ]
    print(f"\n{'':38}{'pocktvm':>12}{'PyTorch':>12}")
    for label, key, form, factor in rows:
        cells = (form.format(run[key] * factor) for run in (ours, theirs))
        print(f"{label:38}" + "".join(f"{cell:>12}" for cell in cells))
    for label, part in (
        ("first loss", slice(1)),
        ("mean loss of the last 90 steps", slice(-90, None)),
    ):
        means = (statistics.mean(run["losses"][part]) for run in (ours, theirs))
        print(f"{label:38}" + "".join(f"{mean:>12.4f}" for mean in means))
    for label, index in (("held-out accuracy before", 0), ("held-out accuracy after", 1)):
        print(f"{label:38}" + "".join(f"{r['accuracy'][index]:>12.3f}" for r in (ours, theirs)))
    print(f"{'gap of the losses around one update':38}{gap:>12.1e} of the loss\n")


def largest_gap(run: dict, other: dict) -> float:
    """Relative, of the losses before and after the first update.

    Adam divides a gradient by its own size, so rounding in gradients near zero moves weights as far
    as real gradients do: PyTorch on one thread and on two parts from itself within four steps.
    """
    pairs = list(zip(run["losses"], other["losses"], strict=False))[:2]
    return max(abs(a - b) / max(abs(b), 0.01) for a, b in pairs)


def emulate(options: argparse.Namespace, artifact: Path, ours: dict) -> None:
    """A few of the same steps with the Pi's library, when an emulator is installed."""
    from pocktvm.errors import PockError
    from pocktvm.manifest import emulator_of, read_manifest

    try:
        emulator = emulator_of(read_manifest(artifact))
    except PockError as error:
        print(f"rpi4: built, not run: no qemu-user\n{error}")
        return
    run = start(options, "pocktvm", artifact, steps=3)
    gap = largest_gap(run, ours)
    print(f"rpi4: emulated by {emulator[0]}, not run on a board; 3 steps, losses within {gap:.1e}")
    print(f"      of this machine's, and {run['accuracy'][1]:.3f} of held-out digits after them")


if __name__ == "__main__":
    sys.exit(main())
