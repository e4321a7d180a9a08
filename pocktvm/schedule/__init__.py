"""Kernels: every group becomes a loop nest, written by the first rule that takes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from pocktvm.ir.graph import Graph
from pocktvm.ir.kernels import Kernels
from pocktvm.ir.target import Target
from pocktvm.schedule.compile_kernel import KernelCompiler
from pocktvm.schedule.program import ProgramBuilder


def schedule(
    graphs: Sequence[Graph],
    target: Target,
    *,
    progress: Callable[[str], None] | None = None,
    compiler: KernelCompiler | None = None,
) -> Kernels:
    """Compile the kernels of all programs of a build.

    Equal kernels are compiled once, also across programs and builds (schedule/cache.py). Raises
    PockError for an operator that neither a rule nor TVM can implement."""
    compiler = compiler or KernelCompiler()
    consts: dict[str, np.ndarray] = {}
    programs = {}
    for graph in graphs:
        builder = ProgramBuilder(graph, target, compiler, consts)
        programs[graph.name] = builder.build(progress)
    used = {call.symbol for program in programs.values() for call in program.calls}
    kernels = {c.kernel.symbol: c.kernel for c in compiler.done.values() if c.kernel.symbol in used}
    params = {name: p for graph in graphs for name, p in graph.params.items()}
    return Kernels(kernels, programs, params, consts).check()
