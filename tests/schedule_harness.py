"""Runs one task of a schedule rule on the host and compares it with the reference."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from pocktvm.ir.graph import Node, Value
from pocktvm.reference import eval_node
from pocktvm.schedule.pack import apply_pack
from pocktvm.schedule.rule import Task, defaults
from pocktvm.targets import load_target
from pocktvm.tvm_api import IRModule, buffer_types, compile_module, tvm, tvm_target

rng = np.random.default_rng(0)


def typed(**types: Any) -> dict[str, Value]:
    """`x=shape`, or `x=(shape, dtype)`."""
    return {
        name: Value(name, *t) if t and isinstance(t[-1], str) else Value(name, tuple(t))
        for name, t in types.items()
    }


def window_out(size, kernel, stride, padding, dilation) -> list[int]:
    """Height and width behind a window over (h, w); padding is (top, left, bottom, right)."""
    return [
        (n + padding[i] + padding[i + 2] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i, n in enumerate(size)
    ]


def host(lanes: int, lane_fma: bool = False, registers: int | None = None) -> Any:
    """The host, as if its vectors had `lanes` float32."""
    target = load_target("host")
    count = registers or (16 if lanes == 8 else 32)
    isa = dataclasses.replace(
        target.isa, vector_bytes=4 * lanes, vector_registers=count, lane_fma=lane_fma
    )
    return dataclasses.replace(target, isa=isa)


def run_rule(
    task: Task, rule: Any, arrays: dict[str, np.ndarray], overwrite: bool = False, **knobs: Any
) -> list[Any]:
    """The outputs of the rule's kernel; buffers start as garbage. `overwrite`: outputs lie over the
    inputs whose memory the rule lets them take."""
    reason = rule.decline(task)
    assert reason is None, reason
    emitted = rule.emit(task, {**defaults(rule.knobs(task)), **knobs})
    inputs = []
    for index, name in enumerate(task.node.inputs):
        array = np.ascontiguousarray(arrays[name])
        if index in emitted.pack:
            assert index in task.frozen
            packed = emitted.pack[index]
            array = apply_pack(packed.name, array, dict(packed.params))
        inputs.append(array.ravel())
    outputs = [
        np.full(max(task.values[o].size, 1), 77, task.values[o].dtype) for o in task.node.outputs
    ]
    scratch = [np.full(size, 55, dtype) for size, dtype in emitted.workspaces]
    declared = [dtype for _, dtype in buffer_types(emitted.func)]  # moved data travels as bits
    pairs = zip((*inputs, *outputs, *scratch), declared, strict=True)
    buffers = [tvm.runtime.tensor(a.view(d) if a.size else a) for a, d in pairs]
    for out, name in emitted.inplace if overwrite else ():
        buffers[len(inputs) + out] = buffers[name]
    compiled = compile_module(IRModule({"main": emitted.func}), tvm_target(task.target.tvm))
    compiled["main"](*buffers)
    results = buffers[len(inputs) : len(inputs) + len(outputs)]
    return [
        r.numpy().view(task.values[o].dtype).reshape(task.shape(o))
        for r, o in zip(results, task.node.outputs, strict=True)
    ]


def check_rule(
    node: Node, values: dict[str, Value], rule: Any, target: Any, *, frozen: tuple[str, ...] = (),
    tolerance: float = 2e-5, arrays: dict[str, np.ndarray] | None = None, **knobs: Any,
) -> None:  # fmt: skip
    """Fail unless the kernel gives the reference's numbers on normal inputs."""
    indices = frozenset(node.inputs.index(name) for name in frozen)
    task = Task(node, values, {}, indices, target)
    arrays = dict(arrays or {})
    for name in node.inputs:
        if name not in arrays:
            arrays[name] = rng.standard_normal(values[name].shape).astype(np.float32)
    expected = eval_node(node, values, arrays)
    for name, got, want in zip(node.outputs, run_rule(task, rule, arrays, **knobs), expected,
                               strict=True):  # fmt: skip
        scale = max(1.0, float(np.abs(want).max()))
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * scale, err_msg=f"{name}")
