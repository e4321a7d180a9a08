"""What a graph needs at least, before a single kernel is compiled.

Counted as the plan counts (views share memory, an update lies over its parameter), with every
operator allowed to compute in place and no workspace: no plan of this order can be smaller. Good
for refusing early, and for comparing builds that were never made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pocktvm.ir.graph import Graph, Node
from pocktvm.ir.kernels import aligned
from pocktvm.ir.memory import CLASSES, MemoryPlan
from pocktvm.ir.ops import VIEWS
from pocktvm.memory.lifetimes import CLASS_OF


@dataclass(frozen=True)
class _Peak:
    nbytes: int
    label: str
    by_role: dict[str, int]


def estimate(graphs: Sequence[Graph]) -> MemoryPlan:
    """A plan without offsets whose numbers are lower bounds; code is not counted."""
    params = {name: param for graph in graphs for name, param in graph.params.items()}
    consts = {name: array for graph in graphs for name, array in graph.consts.items()}
    by_class = dict.fromkeys(CLASSES, 0)
    for param in params.values():
        by_class[CLASS_OF[param.kind]] += aligned(int(param.value.nbytes))
    persistent = sum(by_class.values())
    by_class["frozen"] = sum(int(a.nbytes) for a in consts.values())
    peak = max((_peak(graph) for graph in graphs), key=lambda p: p.nbytes)
    for role, nbytes in peak.by_role.items():
        by_class[{"gradient": "gradients", "workspace": "workspace"}.get(role, "activations")] += (
            nbytes
        )
    arena = persistent + peak.nbytes
    return MemoryPlan(
        arena_bytes=arena,
        persistent_bytes=persistent,
        lower_bound_bytes=arena,
        total_bytes=arena + by_class["frozen"],
        offsets={},
        by_class=by_class,
        peak_call=peak.label,
    )


def _peak(graph: Graph) -> _Peak:
    """The node with most live bytes: what lives through it, and the larger of what dies there and
    what it makes."""
    root = _roots(graph)
    sizes = {n: aligned(graph.values[n].nbytes) for n in _transient(graph, root)}
    last = {root.get(n, n): i for i, node in enumerate(graph.nodes) for n in node.inputs}
    last |= {root.get(n, n): len(graph.nodes) for n in graph.outputs.values()}
    live = {n for n in graph.inputs if n in sizes}
    best = _Peak(0, graph.name, {})
    for index, node in enumerate(graph.nodes):
        made = {root.get(o, o) for o in node.outputs} & sizes.keys() - live
        dying = {n for n in live if last.get(n, -1) <= index}
        through = live - dying
        shown = through | max(made, dying, key=lambda names: sum(sizes[n] for n in names))
        total = sum(sizes[n] for n in shown)
        if total > best.nbytes:
            best = _Peak(total, _label(node), _by_role(graph, sizes, shown))
        live = through | {n for n in made if last.get(n, -1) > index}
    return best


def _roots(graph: Graph) -> dict[str, str]:
    """View -> the value whose memory it is; a parameter's new value -> the parameter."""
    root = {value: param for param, value in graph.updates.items()}
    for node in graph.nodes:
        if node.op in VIEWS:
            root.setdefault(node.outputs[0], root.get(node.inputs[0], node.inputs[0]))
    return root


def _transient(graph: Graph, root: dict[str, str]) -> set[str]:
    names = {*graph.inputs, *(o for node in graph.nodes for o in node.outputs)}
    kept = {*graph.params, *graph.consts, *graph.scalars}
    return {n for n in names if n not in root and n not in kept}


def _by_role(graph: Graph, sizes: dict[str, int], names: set[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in names:
        role = graph.values[name].role
        counts[role] = counts.get(role, 0) + sizes[name]
    return counts


def _label(node: Node) -> str:
    ops = "+".join(n.op for n in node.kernel_nodes())
    return f"{node.layer}: {ops}" if node.layer else ops
