"""From a task to a compiled kernel: ask the rules, emit, hand TIR to TVM's LLVM, cache."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pocktvm.errors import InternalError
from pocktvm.ir.kernels import ArgSpec, Kernel, Launch
from pocktvm.schedule.cache import KernelCache, key_of
from pocktvm.schedule.gpu.rules import GPU_RULES
from pocktvm.schedule.rule import Emitted, Pack, Rule, Task, defaults
from pocktvm.schedule.rules import RULES
from pocktvm.tvm_api import (
    IRModule,
    buffer_types,
    compile_module,
    device_source,
    tvm_target,
    version,
)


@dataclass(frozen=True)
class Compiled:
    """A kernel with what its callers must prepare: workspaces and packed constants."""

    kernel: Kernel
    workspaces: tuple[tuple[int, str], ...]
    pack: Mapping[int, Pack]


class NoRule(Exception):
    """No rule takes a group; carries each rule's reason."""


@dataclass
class KernelCompiler:
    """Compiles tasks for one target; equal tasks share one kernel."""

    cache: KernelCache = field(default_factory=KernelCache)
    done: dict[str, Compiled] = field(default_factory=dict)
    knobs_for: Any = None  # (task, rule) -> tuned knobs or None

    def compile(self, task: Task) -> Compiled:
        """The kernel of a task. Raises NoRule when every rule declines."""
        if task.signature not in self.done:
            self.done[task.signature] = self._compile(task)
        return self.done[task.signature]

    def _compile(self, task: Task) -> Compiled:
        rule = choose_rule(task)
        tuned = self.knobs_for(task, rule) if self.knobs_for else None
        options = rule.knobs(task)
        knobs = {**defaults(options), **(tuned or {})}
        target = task.target
        key = key_of(
            task.signature, rule.name, knobs, dict(target.tvm), vars(target.isa), version()
        )
        symbol = f"{rule.name}_{key[:12]}"
        cached = self.cache.get(key)
        if cached is None:
            emitted = rule.emit(task, knobs)
            facts = _facts(emitted)
            if target.is_gpu:
                data, facts["launches"] = compile_source(emitted, symbol, task)
            else:
                data = compile_object(aliasing_admitted(emitted), symbol, task)
            self.cache.put(key, data, facts)
        else:
            data, facts = cached
        made = _compiled(task, rule, symbol, data, facts, bool(tuned))
        points = math.prod(len(knob.options) for knob in options.values())
        return replace(made, kernel=replace(made.kernel, knobs=points))


def choose_rule(task: Task) -> Rule:
    """The first rule that does not decline."""
    reasons = []
    for rule in GPU_RULES if task.target.is_gpu else RULES:
        reason = rule.decline(task)
        if reason is None:
            return rule
        reasons.append(f"{rule.name}: {reason}")
    raise NoRule("; ".join(reasons))


def aliasing_admitted(emitted: Emitted) -> Any:
    """The function without the promise that its arguments do not overlap, where they may.

    With one output the promise is kept in effect: each element is read before it is written."""
    if len(emitted.inplace) > 1:
        return emitted.func.with_attr("tirx.noalias", False)
    return emitted.func


def compile_object(func: Any, symbol: str, task: Task) -> bytes:
    """The object file that defines `__tvm_ffi_<symbol>` for the task's target."""
    target = tvm_target(task.target.tvm)
    func = func.with_attr("global_symbol", symbol).with_attr("target", target)
    handle, path = tempfile.mkstemp(suffix=".o")
    os.close(handle)
    try:
        compile_module(IRModule({symbol: func}), target).mod.write_to_file(path, "o")
        with open(path, "rb") as file:
            return file.read()
    finally:
        os.unlink(path)


def compile_source(emitted: Emitted, symbol: str, task: Task) -> tuple[bytes, list[dict[str, Any]]]:
    """CUDA C that defines the kernel's GPU functions, and their launches."""
    target = tvm_target(task.target.tvm)
    # `__restrict__` would be a lie wherever an output may lie over an input
    func = emitted.func.with_attr("tirx.noalias", not emitted.inplace)
    func = func.with_attr("global_symbol", symbol).with_attr("target", target)
    text, launches = device_source(func, target)
    return text.encode(), launches


def _facts(emitted: Emitted) -> dict[str, Any]:
    return {
        "args": buffer_types(emitted.func),
        "workspaces": [list(w) for w in emitted.workspaces],
        "inplace": [list(p) for p in emitted.inplace],
        "pack": {str(i): [p.name, dict(p.params)] for i, p in emitted.pack.items()},
        "flops": emitted.flops,
    }


def _compiled(
    task: Task, rule: Rule, symbol: str, data: bytes, facts: Mapping[str, Any], tuned: bool
) -> Compiled:
    n_inputs, n_outputs = len(task.node.inputs), len(task.node.outputs)
    workspaces = tuple((int(n), str(d)) for n, d in facts["workspaces"])
    args = tuple(ArgSpec(tuple(shape), dtype) for shape, dtype in facts["args"])
    if len(args) != n_inputs + n_outputs + len(workspaces):
        raise InternalError(f"{rule.name} made {len(args)} arguments for {task.node}")
    kernel = Kernel(
        symbol=symbol,
        object=data,
        args=args,
        n_inputs=n_inputs,
        n_outputs=n_outputs,
        rule=rule.name,
        tuned=tuned,
        flops=int(facts["flops"]),
        inplace=tuple((n_inputs + o, i) for o, i in facts["inplace"]),
        launches=tuple(
            Launch(entry["entry"], *(tuple(entry[key]) for key in ("args", "grid", "block")))
            for entry in facts.get("launches", ())
        ),
    )
    pack = {int(i): Pack(name, params) for i, (name, params) in facts["pack"].items()}
    return Compiled(kernel, workspaces, pack)
