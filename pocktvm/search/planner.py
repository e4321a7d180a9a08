"""What a choice of tensors costs: the memory planner's bytes, and the work of a step.

Bytes are those of the graphs a build of this choice would make (memory/estimate.py), differentiated
and optimised; code is counted by kernel, at the size an analysis artifact's kernels have. Work is
a step's time by the roofline of passes/costs.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pocktvm import memory
from pocktvm.autodiff.differentiate import differentiate, predict_graph
from pocktvm.ir.graph import Graph, Node
from pocktvm.ir.model import Model
from pocktvm.ir.ops import VIEWS
from pocktvm.ir.part import Part
from pocktvm.ir.target import Target
from pocktvm.levers import shrunk
from pocktvm.passes import run_passes
from pocktvm.passes.costs import seconds
from pocktvm.schedule import schedule
from pocktvm.schedule.compile_kernel import KernelCompiler
from pocktvm.tuning.records import Records

Progress = Callable[[str, str], None]


@dataclass(frozen=True)
class Cost:
    """What one choice costs: bytes of plan and arena, roofline seconds of a step (`work`)."""

    total_bytes: int
    arena_bytes: int
    work: float


class Planner:
    """Plans choices of one model, each once. `kernel_bytes`: code of one kernel; 0 where it is not
    known, and costs are from below."""

    def __init__(
        self, model: Model, loss: Any, optimizer: Any, target: Target, kernel_bytes: float = 0
    ) -> None:
        self.model, self.loss, self.optimizer, self.target = model, loss, optimizer, target
        self.kernel_bytes = kernel_bytes
        self._known: dict[Any, Cost] = {}

    @property
    def planned(self) -> int:
        """How many choices were planned so far."""
        return len(self._known)

    def cost(self, updated: Mapping[str, float]) -> Cost:
        """The cost of training `updated` (tensor -> share)."""
        key = frozenset((n, p.indices if isinstance(p, Part) else 1) for n, p in updated.items())
        if key not in self._known:
            self._known[key] = cost_of(self.step(updated), self.target, self.kernel_bytes)
        return self._known[key]

    def step(self, updated: Mapping[str, float]) -> Graph:
        """The optimised step of a choice."""
        step, _ = differentiate(self.model, updated, self.loss, self.optimizer)
        return run_passes(step, self.target)

    def plan(self, updated: Mapping[str, float], progress: Progress | None = None) -> int:
        """Bytes of the very plan a build of this choice makes, its kernels compiled."""
        pair = differentiate(self.model, updated, self.loss, self.optimizer)
        graphs = tuple(run_passes(g, self.target) for g in pair)

        def detail(text: str) -> None:
            if progress:
                progress("compile the chosen scheme", text)

        compiler = KernelCompiler(knobs_for=Records(self.target).knobs)
        kernels = schedule(graphs, self.target, progress=detail, compiler=compiler)
        return memory.plan(kernels, self.target.fast_memory_bytes).total_bytes

    def least(self, updated: Mapping[str, float], limit: int) -> Cost:
        """The cost when the build computes again what it need not keep (levers.py) to get within
        `limit`, as far as that goes."""
        (step,) = shrunk([self.step(updated)], limit, self.target)
        return cost_of(step, self.target, self.kernel_bytes)

    def activation_bytes(self) -> dict[str, int]:
        """Weight -> bytes of the activation its gradient reads."""
        graph = predict_graph(self.model, list(self.model.parameters))
        makers = graph.producers()
        found: dict[str, int] = {}
        for node in graph.nodes:
            if node.op in ("conv2d", "conv2d_input_grad", "matmul"):
                name = node.inputs[1]
                while (maker := makers.get(name)) is not None and len(maker.inputs) == 1:
                    name = maker.inputs[0]
                found[name] = found.get(name, 0) + graph.values[node.inputs[0]].nbytes
        return found


def cost_of(step: Graph, target: Target, kernel_bytes: float = 0) -> Cost:
    """The cost of an optimised step."""
    plan = memory.estimate([step])
    work = sum(seconds(n, step.values, target) for n in step.nodes if n.op not in VIEWS)
    more = int(kernel_bytes * count_kernels(step)) + repacked_bytes(step)
    return Cost(plan.total_bytes + more, plan.arena_bytes, work)


def repacked_bytes(step: Graph) -> int:
    """What frozen weights take beyond once: the forward and the gradient read another packing."""
    readers: dict[str, set[Any]] = {}
    for node in (part for n in step.nodes for part in n.kernel_nodes()):
        if node.op in ("conv2d", "conv2d_input_grad", "matmul") and node.inputs[1] in step.consts:
            turned = bool(node.attrs.get("transpose_b"))
            readers.setdefault(node.inputs[1], set()).add((node.op, turned))
    return sum(int(step.consts[n].nbytes) * (len(kinds) - 1) for n, kinds in readers.items())


def count_kernels(step: Graph) -> int:
    """Distinct kernels of an optimised graph: nodes alike in operators and shapes share one."""

    def alike(node: Node) -> Any:
        shapes = tuple(step.values[n].shape for n in (*node.inputs, *node.outputs))
        return tuple(n.op for n in node.kernel_nodes()), shapes

    return len({alike(node) for node in step.nodes if node.op not in VIEWS})
