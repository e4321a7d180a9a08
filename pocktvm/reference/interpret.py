"""Runs a graph node by node with torch: slow, plain, and the oracle of everything else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from pocktvm.errors import InternalError
from pocktvm.ir.graph import Graph, Node, Value
from pocktvm.reference.dropout import step_seed
from pocktvm.reference.registry import RULES, Tensor


@dataclass(frozen=True)
class Result:
    """outputs: by the graph's names ("loss", "output"); updates: new value of each parameter, in
    its stored layout; values: everything else that was computed, by value name."""

    outputs: dict[str, np.ndarray]
    updates: dict[str, np.ndarray]
    values: dict[str, np.ndarray]


def evaluate(
    graph: Graph,
    inputs: Mapping[str, np.ndarray],
    *,
    params: Mapping[str, np.ndarray] | None = None,
    lr: float = 1e-3,
    t: int = 1,
    seed: int = 0,
    dtype: str = "float32",
    keep: bool = True,
) -> Result:
    """Evaluate one step of `graph`, fused or not.

    `params` replaces parameters and optimizer states by name, in their stored layout. `t` counts
    steps from 1, `seed` is the run's, for dropout. `dtype` is what floating values are computed in;
    float64 serves differences. Without `keep` a value is dropped after its last reader, and
    `values` holds only results. Runs on one thread, so that numbers do not depend on the machine.
    """
    missing = [name for name in graph.inputs if name not in inputs]
    if missing:
        raise InternalError(f"{graph.name}: no array for inputs {missing}")
    sources: dict[str, np.ndarray] = {name: np.asarray(inputs[name]) for name in graph.inputs}
    sources |= {name: np.asarray(_scalar(f, lr, t, seed)) for name, f in graph.scalars.items()}
    sources |= {name: param.value for name, param in graph.params.items()}
    sources |= dict(graph.consts)
    sources |= {name: np.asarray(a) for name, a in (params or {}).items() if name in graph.params}
    tensors = {name: _tensor(a, graph.values[name], dtype) for name, a in sources.items()}
    dying = {} if keep else _last_reads(graph)
    with torch.no_grad(), one_thread():
        for index, node in enumerate(graph.nodes):
            run_node(node, graph.values, tensors, dtype)
            for name in dying.get(index, ()):
                del tensors[name]
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    return Result(
        outputs={key: arrays[name] for key, name in graph.outputs.items()},
        updates={param: arrays[name] for param, name in graph.updates.items()},
        values=arrays,
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on the calling thread alone: on a busy machine its threads spin while they wait for
    each other, and a step of a thousand small operators takes thirteen times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _last_reads(graph: Graph) -> dict[int, list[str]]:
    """Node index -> values nobody reads after it and nobody asked for."""
    last: dict[str, int] = {}
    for index, node in enumerate(graph.nodes):
        last.update(dict.fromkeys((*node.inputs, *node.outputs), index))
    results = graph.results()
    dying: dict[int, list[str]] = {}
    for name, index in last.items():
        if name not in results:
            dying.setdefault(index, []).append(name)
    return dying


def eval_node(
    node: Node, values: Mapping[str, Value], arrays: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, ...]:
    """One node (or group) on arrays; returns its outputs."""
    tensors = {name: _tensor(arrays[name], values[name], "float32") for name in node.inputs}
    with torch.no_grad():
        run_node(node, values, tensors, "float32")
    return tuple(tensors[name].numpy() for name in node.outputs)


def run_node(
    node: Node, values: Mapping[str, Value], tensors: MutableMapping[str, Tensor], dtype: str
) -> None:
    """Compute `node`'s outputs into `tensors`; a group's inner values stay inside."""
    if node.body:
        inner = {name: tensors[name] for name in node.inputs}
        for part in node.body:
            run_node(part, values, inner, dtype)
        tensors.update({name: inner[name] for name in node.outputs})
        return
    rule = RULES.get(node.op)
    if rule is None:
        raise InternalError(f"no reference for '{node.op}': {node}")
    outs = [values[name] for name in node.outputs]
    try:
        results = rule(node, [tensors[name] for name in node.inputs], outs)
    except (RuntimeError, ValueError, IndexError, TypeError, KeyError) as error:
        shapes = [tuple(tensors[name].shape) for name in node.inputs]
        raise InternalError(f"the reference fails on {node} with {shapes}: {error}") from error
    results = results if isinstance(results, tuple) else (results,)
    for out, result in zip(outs, results, strict=True):
        if tuple(result.shape) != tuple(out.shape):
            raise InternalError(f"{node} gives {tuple(result.shape)}, declared {out}")
        tensors[out.name] = result.detach().to(_torch_dtype(out.dtype, dtype)).contiguous()


def _scalar(formula: str, lr: float, t: int, seed: int) -> float:
    if formula == "lr":
        return lr
    if formula == "dropout_seed":
        return step_seed(seed, t)
    kind, _, beta = formula.partition(":")
    if kind != "bias_correction":
        raise InternalError(f"unknown scalar formula '{formula}'")
    return 1.0 - float(beta) ** t


def _torch_dtype(declared: str, dtype: str) -> torch.dtype:
    found = getattr(torch, dtype if declared == "float32" else declared, None)
    if not isinstance(found, torch.dtype):
        raise InternalError(f"the reference knows no dtype '{declared}'")
    return found


def _tensor(array: np.ndarray, value: Value, dtype: str) -> Tensor:
    if tuple(array.shape) != tuple(value.shape):
        raise InternalError(f"{value} was given an array of shape {array.shape}")
    # a copy: torch refuses read-only arrays, and no result may alias a source
    return torch.from_numpy(np.array(array)).to(_torch_dtype(value.dtype, dtype))
