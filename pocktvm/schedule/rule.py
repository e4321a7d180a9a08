"""What a schedule rule is: it takes a task, or declines and says why; it emits a loop nest.

A *task* is one group of the graph with the types of its values, stripped of names that do not
matter, for one target. Rules are tried in order (schedule/rules/__init__.py lists them); the first
that does not decline emits; the fallback accepts everything.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from pocktvm.ir.graph import Node, Value
from pocktvm.ir.target import Target


@dataclass(frozen=True)
class Task:
    """One kernel to write.

    node      the group (or single node); its inputs and outputs are the kernel's arguments
    values    types of every name in the node, internal ones too
    literals  rank-0 constants: baked into the code, not arguments
    frozen    indices of node.inputs whose contents are known at build time (they may be packed)
    """

    node: Node
    values: Mapping[str, Value]
    literals: Mapping[str, float | int | bool]
    frozen: frozenset[int]
    target: Target

    @property
    def anchor(self) -> Node | None:
        """The node that decides the loop nest; None for elementwise groups."""
        return self.node.anchor if self.node.body else self.node

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a value of the task."""
        return self.values[name].shape

    def is_frozen(self, name: str) -> bool:
        """True when the kernel input `name` is a build-time constant."""
        return name in self.node.inputs and self.node.inputs.index(name) in self.frozen

    @cached_property
    def signature(self) -> str:
        """A text equal for tasks that need the same kernel (names replaced by numbers)."""
        numbers: dict[str, int] = {}

        def number(name: str) -> Any:
            if name in self.literals:
                return repr(self.literals[name])
            if name not in numbers:
                numbers[name] = len(numbers)
            return numbers[name]

        def describe(node: Node) -> Any:
            return [
                node.op,
                [number(i) for i in node.inputs],
                [number(o) for o in node.outputs],
                {k: _plain(v) for k, v in sorted(node.attrs.items())},
            ]

        def parts(node: Node) -> list[Any]:
            inner = [parts(part) if part.body else describe(part) for part in node.body]
            return [describe(node), *inner]

        nodes = parts(self.node)
        types = [[n, *self._type(name)] for name, n in numbers.items()]
        return json.dumps([nodes, types, sorted(self.frozen)], separators=(",", ":"))

    def _type(self, name: str) -> tuple[Any, str]:
        value = self.values[name]
        return list(value.shape), value.dtype


def unmasked(task: Task) -> Task | None:
    """The task as it would be without masks: what it packs is no output, what it applies is a
    gradient that reads a whole activation. None for a task without any. The two differ by a few
    instructions a vector, so what is fast for one is for the other."""
    values, outputs, body, inputs = dict(task.values), task.node.outputs, [], task.node.inputs
    for part in task.node.body or (task.node,):
        if part.op == "pack_mask":
            outputs = tuple(o for o in outputs if o != part.outputs[0])
            continue
        if part.op == "apply_mask":
            whole = values[part.outputs[0]].shape
            values[part.inputs[1]] = Value(part.inputs[1], whole)
            attrs = {k: v for k, v in part.attrs.items() if k not in ("group", "test")}
            part = replace(part, op=f"{part.attrs['test']}_grad", attrs=attrs)
        body.append(part)
    if not body or (outputs == task.node.outputs and values == task.values):
        return None
    node = replace(task.node, inputs=inputs, outputs=outputs, body=tuple(body))
    if len(body) == 1:
        node = replace(body[0], layer=task.node.layer)
    return replace(task, node=node, values=values)


@dataclass(frozen=True)
class Pack:
    """How a build-time constant is laid out for a kernel: a named packer and its parameters."""

    name: str
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Emitted:
    """A rule's result. The function's buffers are inputs, outputs, workspaces, in that order.

    workspaces  (elements, dtype) of each scratch buffer: planned in the arena, never the heap
    inplace     (output index, input index) pairs, each counted from 0 in its own list, that may
                share memory: every element is read before the same one is written
    pack        input index -> Pack, for inputs listed in Task.frozen
    """

    func: Any
    workspaces: tuple[tuple[int, str], ...] = ()
    inplace: tuple[tuple[int, int], ...] = ()
    pack: Mapping[int, Pack] = field(default_factory=dict)
    flops: int = 0


@dataclass(frozen=True)
class Knob:
    """A choice a rule leaves open: the default is already fast, tuning may pick another."""

    options: tuple[Any, ...]
    default: Any

    @classmethod
    def around(cls, default: Any, *others: Any) -> Knob:
        """The default first, then the others, each once."""
        return cls(tuple(dict.fromkeys((default, *others))), default)


class Rule(Protocol):
    """One kernel family: takes a task or says why not, names its knobs, writes the loop nest."""

    name: str

    def decline(self, task: Task) -> str | None:
        """None when the rule takes the task; else the reason it does not."""

    def knobs(self, task: Task) -> Mapping[str, Knob]:
        """What tuning may vary for this task."""

    def emit(self, task: Task, knobs: Mapping[str, Any]) -> Emitted:
        """Write the loop nest; `knobs` has a value for every knob."""


class Knobless:
    """The half of a rule that has no knobs: nothing of its kernels is left to tune."""

    name = ""

    def knobs(self, task: Task) -> Mapping[str, Knob]:
        """No knobs."""
        return {}


def defaults(knobs: Mapping[str, Knob]) -> dict[str, Any]:
    """Every knob at its default."""
    return {name: knob.default for name, knob in knobs.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(v) for v in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
