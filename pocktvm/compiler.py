"""The whole compiler on one screen: a model in, an artifact that trains out.

Read this first. Each line of `compile` is one room of the package, in the order of the pipeline;
docs/design.md says why it is so, pocktvm/build.py what a build is made of.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from pocktvm import levers, memory
from pocktvm.artifact import Artifact
from pocktvm.autodiff.differentiate import differentiate
from pocktvm.build import Build, Progress
from pocktvm.codegen import emit_artifact
from pocktvm.fit import fit
from pocktvm.identity import identify, label_inputs
from pocktvm.ir.graph import Graph
from pocktvm.ir.kernels import Kernels
from pocktvm.ir.memory import MemoryPlan
from pocktvm.ir.rates import Rates
from pocktvm.passes import run_passes
from pocktvm.recorded import record_self_test
from pocktvm.schedule import schedule
from pocktvm.schedule.compile_kernel import KernelCompiler
from pocktvm.stages import Stages
from pocktvm.tuning.records import Records


def compile(
    build: Build, out: str | Path | None = None, progress: Progress | None = None
) -> Artifact:
    """The artifact of a build, in the folder `out` or in a temporary one.

    `progress` is called as (stage, detail). Raises PockError for everything the caller can mend,
    before any long work where possible. `pocktvm.compile` (api.py) makes the build first.
    """
    stages = Stages(progress)
    stages.enter("import")
    build = build.settled(progress)
    model, updated = build.resolve()
    stages.saw("import", model.module)

    stages.enter("differentiate")
    rates = Rates.of(model, updated) if build.rates else None
    graphs: tuple[Graph, ...] = differentiate(model, updated, build.loss, build.optimizer, rates)
    stages.saw("differentiate", *graphs)

    stages.enter("record the self-test")
    inputs = (*label_inputs(model, build.loss), *((rates.input,) if rates else ()))
    self_test = record_self_test(graphs, inputs, build.optimizer, saved=build.saved)

    stages.enter("optimise the graph")
    graphs = tuple(run_passes(g, build.target, stages.saw_pass, build.saved) for g in graphs)

    compiler = KernelCompiler(knobs_for=Records(build.target).knobs)
    lower = functools.partial(_lower, build=build, compiler=compiler, stages=stages)
    kernels, plan, trade = fit(build, graphs, lower, self_test)

    def link(kernels: Kernels, plan: MemoryPlan, out: str | Path | None) -> Artifact:
        stages.enter("link")
        seconds = stages.finish()
        identity = identify(build, model, inputs, updated, kernels, plan, seconds, trade)
        return Artifact.emit(emit_artifact, kernels, plan, identity, self_test, build.target, out)

    artifact = link(kernels, plan, out)
    if trade is not None and build.target.is_host:
        stages.enter("measure the trade")
        unbounded = link(*lower(graphs), None)
        artifact.trade = levers.measured(trade, artifact.path, unbounded.path)
    return artifact


def _lower(
    graphs: Sequence[Graph], build: Build, compiler: KernelCompiler, stages: Stages
) -> levers.Planned:
    """Kernels of the programs, and where every one of their buffers lies."""
    stages.enter("compile kernels")
    device = build.target.within(build.limit)
    kernels = schedule(graphs, device, progress=stages.detail, compiler=compiler)

    stages.enter("plan memory")
    plan = memory.plan(kernels, device.fast_memory_bytes)
    memory.verify(kernels, plan)
    stages.saw("plan", plan)
    return kernels, plan
