"""A Raspberry Pi 4's training step without a Pi: what it executes, and what its caches miss.

    python -m benchmarks.emulated --workload w1a --scheme sparse [--top 15] [--no-caches] [--json]

Builds for `--target` (rpi4), runs the artifact's own program on one thread under qemu-aarch64 with
our plugin (pocktvm/tuning/counter.c), and counts the second step, kernel by kernel. The caches are
a model of a Cortex-A72's, without prefetch; counts are not times, and nothing here is calibrated on
a board.
The peers' counts were taken once the same way and are printed as they were; see
docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from benchmarks.counting import count_step
from benchmarks.inner_loops import inner_loops
from benchmarks.workloads import SCHEMES, WORKLOADS
from pocktvm.tuning.counter import CannotCount

# (workload, scheme) -> peer -> millions a step. Official aarch64 wheels of TensorFlow 2.21 and
# PyTorch 2.9.1 (the last one a Cortex-A72 can run) on the same model, batch and trained tensors,
# one thread, qemu-aarch64 7.2, the same model of the caches. Not measured by this command.
PEERS = {
    ("w1a", "sparse"): {
        "TensorFlow 2.21": {"instructions": 899, "fma_vector": 333, "l1_misses": 23.7,
                            "l2_misses": 7.3},
        "PyTorch 2.9.1": {"instructions": 1107, "fma_vector": 333, "l1_misses": 40,
                          "l2_misses": 12.7},
    },
    ("w1a", "full"): {
        "TensorFlow 2.21": {"instructions": 1836, "fma_vector": 596, "l1_misses": 48.6,
                            "l2_misses": 18.1},
        "PyTorch 2.9.1": {"instructions": 3559, "fma_vector": 568, "l1_misses": 79,
                          "l2_misses": 24.3},
    },
}  # fmt: skip
LANES = 4
COLUMNS = ("instructions", "fma_vector", "loads", "stores", "l1_misses", "l2_misses")
HEADER = "instructions     FMLA    loads   stores   L1 miss  L2 miss"


def measure(workload: str, scheme: str, target: str, caches: bool, folder: Path) -> dict:
    """Build, count, and look at the machine code of every kernel of the step."""
    import pocktvm
    from pocktvm.build import Build
    from pocktvm.frontend.resolve import resolve_model
    from pocktvm.schedule import schedule
    from pocktvm.targets import load_target

    work, device = WORKLOADS[workload], load_target(target)
    source = resolve_model(work.model, batch=work.batch)
    options = {**source.facts(), "scheme": SCHEMES[scheme], "target": device}
    given = source.module, source.example_inputs
    artifact = pocktvm.compile(*given, out=folder / "artifact", **options)
    counted = count_step(artifact.path, caches=caches)
    kernels = schedule(Build.of(*given, **options).programs(), device)  # the same, from the cache
    calls = json.loads((artifact.path / "manifest.json").read_text())["timeline"]["step"]
    symbols = [call.symbol for call in kernels.programs["step"].calls]
    rows = [
        {"kernel": call["call"], "rule": call["rule"], "flops": call["flops"], **counts.as_dict()}
        for call, counts in zip(calls, counted.kernels, strict=True)
    ]
    return {
        "workload": workload, "scheme": scheme, "target": device.name,
        "step": counted.step.as_dict(), "flops": sum(call["flops"] for call in calls),
        "peers_millions": PEERS.get((workload, scheme), {}),
        "loops": loops({s: kernels.kernels[s] for s in symbols}), "kernels": rows,
    }  # fmt: skip


def loops(kernels: dict) -> list[dict]:
    """Innermost loops that multiply: rule, density, spills; see inner_loops.py."""
    return [
        {"rule": k.rule, "symbol": k.symbol, "instructions": loop.instructions, "fma": loop.fma,
         "spills": loop.spills}
        for k in kernels.values()
        for loop in inner_loops(k.object)
    ]  # fmt: skip


def ratios(result: dict) -> dict[str, dict[str, float]]:
    """peer -> count -> ours divided by the peer's."""
    return {
        peer: {key: result["step"][key] / 1e6 / value for key, value in counts.items()}
        for peer, counts in result["peers_millions"].items()
    }


def show(result: dict, top: int) -> None:
    """The tables for people; counts in millions."""
    step, flops = result["step"], result["flops"]
    print(f"{result['workload']} {result['scheme']} for {result['target']}, one step on one thread")
    print("emulated: counts are not times; the caches are a model. Millions.\n")
    print(f"{'':30} {HEADER}")
    print(_row("pocktvm", step))
    for peer, counts in result["peers_millions"].items():
        print(_row(f"{peer} (recorded)", {k: v * 1e6 for k, v in counts.items()}))
    for peer, ratio in ratios(result).items():
        named = {"instructions": "instructions", "l2_misses": "L2 misses"}
        text = ", ".join(f"{ratio[k]:.2f}x its {what}" for k, what in named.items() if ratio[k])
        print(f"  against {peer}: {text}")
    ideal = flops / (2 * LANES)
    print(
        f"\n{flops / 1e9:.2f} GFLOP would be {ideal / 1e6:.0f} M FMLA of {LANES} lanes; executed "
        f"{step['fma_vector'] / ideal:.2f} of that, {step['fma_vector'] / step['instructions']:.0%}"
        " of all instructions"
    )
    _show_loops(result["loops"])
    by_rule: dict[str, list[dict]] = {}
    for row in result["kernels"]:
        by_rule.setdefault(row["rule"], []).append(row)
    print("\nby rule")
    totals = [(f"{rule} ({len(rows)})", _sum(rows)) for rule, rows in by_rule.items()]
    for name, counts in sorted(totals, key=lambda t: -t[1]["instructions"]):
        print(_row(name, counts))
    print(f"\nthe {top} largest kernels")
    for row in sorted(result["kernels"], key=lambda r: -r["instructions"])[:top]:
        print(_row(row["kernel"], row))


def _show_loops(found: list[dict]) -> None:
    for rule in sorted({loop["rule"] for loop in found}):
        mine = [loop for loop in found if loop["rule"] == rule]
        spilling = sum(1 for loop in mine if loop["spills"])
        density = sorted(loop["fma"] / loop["instructions"] for loop in mine)
        print(
            f"  {rule}: {len(mine)} inner loops that multiply, {spilling} with spills, "
            f"densest {density[-1]:.0%} FMLA, median {density[len(density) // 2]:.0%}"
        )


def _sum(rows: list[dict]) -> dict[str, int]:
    return {key: sum(row[key] for row in rows) for key in COLUMNS}


def _row(name: str, counts: dict) -> str:
    widths = (12, 8, 8, 8, 9, 8)
    cells = (
        f"{counts[key] / 1e6:{width}.2f}" if counts.get(key) else " " * width
        for key, width in zip(COLUMNS, widths, strict=True)
    )
    return f"{name[:30]:30} {' '.join(cells)}"


def main(argv: list[str] | None = None) -> int:
    """Parse, count, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workload", choices=sorted(WORKLOADS), default="w1a")
    parser.add_argument("--scheme", choices=sorted(SCHEMES), default="sparse")
    parser.add_argument("--target", default="rpi4", help="a target whose emulator is qemu-aarch64")
    parser.add_argument("--no-caches", action="store_true", help="instructions only, faster")
    parser.add_argument("--top", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="pocktvm-count-") as folder:
        try:
            result = measure(options.workload, options.scheme, options.target,
                             not options.no_caches, Path(folder))  # fmt: skip
        except CannotCount as reason:
            raise SystemExit(f"cannot count: {reason}") from None
    if options.json:
        print(json.dumps(result | {"ratios": ratios(result)}))
    else:
        show(result, options.top)
    return 0


if __name__ == "__main__":
    sys.exit(main())
