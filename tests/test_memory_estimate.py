"""The estimate from a graph is a lower bound of every plan made from it."""

import pytest
from graphs import Build
from sample_graphs import inverted_residual_step

from pocktvm.ir.kernels import ArgSpec, Buffer, Call, Kernel, Kernels, Program
from pocktvm.memory import estimate, plan, verify
from pocktvm.passes import run_passes


def as_kernels(graph, inplace):
    """One call a node, without compiling anything; `inplace`: every pair of equal sizes."""
    kind = {n: p.kind for n, p in graph.params.items()}
    kind |= dict.fromkeys(graph.consts, "frozen") | dict.fromkeys(graph.inputs, "input")
    kind |= dict.fromkeys(graph.scalars, "scalar")
    replaces = {v: p for p, v in graph.updates.items()}
    buffers, calls, kernels = {}, [], {}
    views = {n.outputs[0]: n.inputs[0] for n in graph.nodes if n.op == "reshape"}
    for name, value in graph.values.items():
        alias = views.get(name) or replaces.get(name)
        role = kind.get(alias or name, value.role)
        buffers[name] = Buffer(name, value.shape, value.dtype, value.nbytes, role, alias)
    for i, node in enumerate(graph.nodes):
        if node.op == "reshape":
            continue
        args = (*node.inputs, *node.outputs)
        n = len(node.inputs)
        pairs = tuple(
            (n + o, k)
            for o, out in enumerate(node.outputs)
            for k, name in enumerate(node.inputs)
            if graph.values[out].nbytes == graph.values[name].nbytes
            and (inplace or replaces.get(out) == name)
        )
        specs = tuple(ArgSpec(graph.values[a].shape, graph.values[a].dtype) for a in args)
        kernels[f"k{i}"] = Kernel(f"k{i}", b"", specs, n, len(node.outputs), "test")
        calls.append(Call(f"k{i}", args, n, len(node.outputs), "", pairs))
    program = Program(
        "step", tuple(calls), buffers, graph.inputs, dict(graph.outputs), dict(graph.scalars)
    )
    return Kernels(kernels, {"step": program}, graph.params, graph.consts)


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("trained", [True, False])
def test_a_bound_below_the_plan_and_close_to_it(inplace, trained):
    graph = run_passes(inverted_residual_step(size=12, trained=trained))
    kernels = as_kernels(graph, inplace)
    result = plan(kernels)
    verify(kernels, result)
    bound = estimate([graph])
    scalars = 64 * len(graph.scalars)
    assert bound.arena_bytes <= result.lower_bound_bytes - scalars
    assert result.arena_bytes <= bound.arena_bytes * 1.6 + 4096
    assert bound.by_class["trained"] == result.by_class["trained"]


def test_by_class_sums_to_the_total():
    b = Build()
    x, w = b.input(8, 16), b.const(b.randn(16, 4))
    y = b.op("matmul", x, w, shape=(8, 4))
    bound = estimate([b.graph(output=b.op("relu", y))])
    assert sum(bound.by_class.values()) == bound.total_bytes
    assert bound.arena_bytes == 8 * 16 * 4 and bound.by_class["frozen"] == 16 * 4 * 4
