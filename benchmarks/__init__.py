"""Measurements; each is a command that explains itself with --help.

    python -m benchmarks.step         a workload's step beside its peers (`make bench`)
    python -m benchmarks.sitting      every row of the table in docs/performance.md
    python -m benchmarks.kernels      a step's kernels beside their rooflines, and beside torch
    python -m benchmarks.memory       planned and measured memory of the zoo (docs/memory.md)
    python -m benchmarks.emulated     what a Raspberry Pi 4 executes and misses, under qemu-aarch64
    python -m benchmarks.inner_loops  how dense a library's innermost loops are

workloads.py says what W1a, W1b, W2, W3 and W4 are.
"""
