"""The whole compiler on one screen: a model in, an artifact that trains out.

Read this first. Each line of `compile` is one room of the package, in the order of the pipeline;
docs/design.md says why it is so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pocktvm import levers, memory
from pocktvm.artifact import Artifact
from pocktvm.autodiff.differentiate import differentiate
from pocktvm.autodiff.losses import parse_loss
from pocktvm.autodiff.optimizers import parse_optimizer
from pocktvm.codegen import emit_artifact
from pocktvm.fit import Build
from pocktvm.frontend.lora import add_adapters
from pocktvm.frontend.source import import_model
from pocktvm.identity import identify, label_inputs
from pocktvm.ir.graph import Graph
from pocktvm.ir.kernels import Kernels
from pocktvm.ir.memory import MemoryPlan
from pocktvm.ir.rates import Rates
from pocktvm.ir.scheme import Scheme
from pocktvm.ir.target import Target
from pocktvm.passes import run_passes
from pocktvm.recorded import record_self_test
from pocktvm.schedule import schedule
from pocktvm.schedule.compile_kernel import KernelCompiler
from pocktvm.search.auto import automatic_scheme
from pocktvm.stages import Stages
from pocktvm.targets import load_target
from pocktvm.tuning.records import Records
from pocktvm.units import parse_bytes

Progress = Callable[[str, str], None]


def compile(
    module: Any,
    example_inputs: Any,
    *,
    target: str | Target = "host",
    scheme: Any = "full",
    loss: str = "cross_entropy",
    optimizer: Any = None,
    budget: int | str | None = None,
    threads: int | None = None,
    dropout: bool = False,
    out: str | Path | None = None,
    name: str = "model",
    published: Mapping[str, Any] | None = None,
    mean: Sequence[float] = (),
    scale: Sequence[float] = (),
    samples: Mapping[str, Any] | None = None,
    analysis: str | Path | None = None,
    rates: bool = False,
    resample: bool = False,
    facts: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Compile a module into an artifact that trains it.

    module          an nn.Module; never mutated. It is trained at the shapes of `example_inputs`.
                    Or the path of an .onnx file: `example_inputs` then only tell the batch, and
                    may be None where the file fixes it
    scheme          what learns: a name, a mapping of patterns, a TOML path, or a Scheme
    loss            as text, with options after a colon ("cross_entropy:label_smoothing=0.1")
    optimizer       pocktvm.SGD() and the like, or text ("adamw:weight_decay=0.01")
    budget          most bytes the device may give (arena, frozen weights and code)
    threads         stored default of the artifact; `load(threads=…)` overrides it
    dropout         the step drops with seeded masks (the seed is `load(seed=…)`); without it
                    dropouts are identities, told once
    out             the artifact's folder; None keeps it in a temporary one (Artifact.save moves it)
    published       the scheme that the name "pockengine" stands for
    mean, scale     per channel: how the device reads uint8 samples
    samples         arrays by input name, labels as `y`: for the scheme "auto", and for channels
                    ranked by activation (docs/schemes.md)
    analysis        table of an analysis to choose from, or to go on with, for the scheme "auto"
    rates           the step has one more input, factors of lr by channel (ir/rates.py)
    resample        the channels that learn of a tensor can be chosen anew between steps, as many as
                    the scheme names (docs/schemes.md)
    facts           more entries of the manifest
    progress        called as (stage, detail) while it works

    Raises PockError for everything the caller can mend, before any long work where possible.
    """
    device = target if isinstance(target, Target) else load_target(target)
    wanted, loss_fn = Scheme.parse(scheme), parse_loss(loss)
    optimizer_rule = parse_optimizer(optimizer or "sgd")
    limit = parse_bytes(budget) if isinstance(budget, str) else budget
    stages = Stages(progress)

    stages.enter("import")
    options: dict[str, Any] = {"name": name, "scheme": published, "mean": mean, "scale": scale}
    options["dropout"] = dropout
    build = Build(
        module, example_inputs, wanted, loss_fn, optimizer_rule, device, options, samples,
        resample,
    )  # fmt: skip
    if wanted.name == "auto":
        # what it may choose from is more than parts
        wanted = automatic_scheme(replace(build, resample=False), limit, analysis, progress)
        build = replace(build, scheme=wanted)
    model, updated = build.resolve()
    stages.saw("import", model.module)

    stages.enter("differentiate")
    factors = Rates.of(model, updated) if rates else None
    graphs: tuple[Graph, ...] = differentiate(model, updated, loss_fn, optimizer_rule, factors)
    stages.saw("differentiate", *graphs)

    stages.enter("record the self-test")
    inputs = (*label_inputs(model, loss_fn), *((factors.input,) if factors else ()))
    self_test = record_self_test(graphs, inputs, optimizer_rule)

    stages.enter("optimise the graph")
    graphs = tuple(run_passes(graph, device, observe=stages.saw_pass) for graph in graphs)

    compiler = KernelCompiler(knobs_for=Records(device).knobs)

    def compiled(graphs: tuple[Graph, ...]) -> levers.Planned:
        stages.enter("compile kernels")
        kernels = schedule(graphs, device.within(limit), progress=stages.detail, compiler=compiler)
        stages.enter("plan memory")
        plan = memory.plan(kernels)
        memory.verify(kernels, plan)
        stages.saw("plan", plan)
        return kernels, plan

    check = functools.partial(build.check, limit=limit)
    plain = graphs
    graphs, kernels, plan, trade = levers.fitted(
        graphs, limit, device, compiled, check,
        lambda parts: build.in_parts(parts, self_test), build.batch(),
    )  # fmt: skip

    def emit(kernels: Kernels, plan: MemoryPlan, out: str | Path | None) -> Artifact:
        stages.enter("link")
        identity = identify(
            model, device, wanted, loss_fn, optimizer_rule, inputs, updated, kernels, plan,
            seconds=stages.finish(), threads=threads, trade=trade.facts() if trade else None,
            **(facts or {}),
        )  # fmt: skip
        return Artifact.emit(emit_artifact, kernels, plan, identity, self_test, device, out)

    artifact = emit(kernels, plan, out)
    if trade is not None and device.is_host:
        stages.enter("measure the trade")
        unbounded = emit(*compiled(plain), None)
        artifact.trade = levers.measured(trade, artifact.path, unbounded.path)
    return artifact


def optimised_graphs(
    module: Any,
    example_inputs: Any,
    *,
    target: Target,
    scheme: Any = "full",
    loss: str = "cross_entropy",
    optimizer: Any = None,
    published: Mapping[str, Any] | None = None,
) -> tuple[Graph, ...]:
    """The first half of `compile`: the programs whose kernels a build would need (for tuning)."""
    wanted = Scheme.parse(scheme)
    model = add_adapters(import_model(module, example_inputs, scheme=published), wanted)
    updated = wanted.resolve(model)
    rule = parse_optimizer(optimizer or "sgd")
    graphs = differentiate(model, updated, parse_loss(loss), rule)
    return tuple(run_passes(graph, target) for graph in graphs)
