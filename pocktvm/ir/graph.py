"""The training graph after differentiation: plain data, one node per operator.

Relax is where a model is imported and differentiated; this is what the passes, the schedule
rules and the memory plan work on. Values are named and typed, nodes are in execution order.

Conventions every room relies on:

- Names of values are unique in a program; `Node.op` is a Relax operator's name without its
  `relax.` / `relax.nn.` prefix (`add`, `conv2d`, `layer_norm`, …) or one of our own. The
  vocabulary, with attributes and shapes, is `pocktvm/ir/ops.py`.
- Floating values are float32; integers are int32 (int64 is narrowed on the way in); bool is bool.
  What is saved as bfloat16 is uint16, its bits (passes/narrow_saved.py); masks and places in a
  window are uint8 (save_masks.py, index_pools.py).
- Elementwise operators broadcast as numpy does; scalars are rank-0 values.
- A *group* is a node with a `body`: what one kernel computes. `op` is then "group", `inputs` and
  `outputs` are what crosses its border, `attrs["anchor"]` is the index in the body of the node that
  decides the loop nest (None for pure elementwise), `attrs["kind"]` that node's op. The body of
  an inverted residual is groups again (passes/fuse_blocks.py).
- Nothing is mutated: passes return new graphs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pocktvm.errors import InternalError
from pocktvm.ir.param import Param

ITEMSIZE = {
    "float32": 4, "int32": 4, "uint32": 4, "int64": 8,
    "uint16": 2, "uint8": 1, "int8": 1, "bool": 1,
}  # fmt: skip
SAVED = ("float32", "bf16", "int8")  # how a step may keep activations for its backward pass


@dataclass(frozen=True)
class Value:
    """A tensor that flows between nodes. `role`: activation | gradient | workspace."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    role: str = "activation"

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(math.prod(self.shape))

    @property
    def nbytes(self) -> int:
        """Bytes of its elements, without padding."""
        return self.size * ITEMSIZE[self.dtype]

    def __str__(self) -> str:
        return f"%{self.name}: {self.dtype}{list(self.shape)}"


@dataclass(frozen=True)
class Node:
    """One operator application. `layer` is the torch module it comes from, for messages."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    layer: str = ""
    body: tuple[Node, ...] = ()

    def kernel_nodes(self) -> tuple[Node, ...]:
        """The operators one kernel computes: those of a group (of groups), or the node itself."""
        if not self.body:
            return (self,)
        return tuple(inner for part in self.body for inner in part.kernel_nodes())

    def names(self) -> set[str]:
        """Every value that the node or its body, however deep, reads or writes."""
        return {*self.inputs, *self.outputs}.union(*(part.names() for part in self.body))

    @property
    def anchor(self) -> Node | None:
        """The node that decides the loop nest; None for a purely elementwise group."""
        if not self.body:
            return self
        index = self.attrs.get("anchor")
        return None if index is None else self.body[index]

    def with_inputs(self, mapping: Mapping[str, str]) -> Node:
        """The same node reading renamed values (body included)."""
        return replace(
            self,
            inputs=tuple(mapping.get(i, i) for i in self.inputs),
            body=tuple(b.with_inputs(mapping) for b in self.body),
        )

    def __str__(self) -> str:
        attrs = "".join(f", {k}={_short(v)}" for k, v in self.attrs.items())
        head = f"{', '.join('%' + o for o in self.outputs)} = "
        head += f"{self.op}({', '.join('%' + i for i in self.inputs)}{attrs})"
        if self.layer:
            head += f"  # {self.layer}"
        return head + "".join(f"\n    {b}" for b in self.body)


@dataclass(frozen=True)
class Graph:
    """One program: `step` (forward, loss, backward, updates) or `predict` (forward).

    inputs   run-time tensors the caller gives, in order (x…, then y)
    scalars  rank-0 values the runtime computes in double before each step, by formula:
             "lr" | "bias_correction:<beta>" (1 - beta**t, t counted from 1) |
             "dropout_seed" (int32, a hash of the run's seed and t)
    params   by value name; trained tensors and optimizer state
    consts   by value name; everything known at build time
    outputs  {"loss": value} and/or {"output": value}
    updates  param value name -> value that replaces it (functional until the memory plan)
    """

    name: str
    values: Mapping[str, Value]
    nodes: tuple[Node, ...]
    inputs: tuple[str, ...]
    outputs: Mapping[str, str]
    scalars: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, Param] = field(default_factory=dict)
    consts: Mapping[str, np.ndarray] = field(default_factory=dict)
    updates: Mapping[str, str] = field(default_factory=dict)

    def producers(self) -> dict[str, Node]:
        """Value name -> the node that computes it."""
        return {o: n for n in self.nodes for o in n.outputs}

    def users(self) -> dict[str, list[Node]]:
        """Value name -> nodes that read it, in order."""
        users: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.inputs):
                users.setdefault(name, []).append(node)
        return users

    def results(self) -> set[str]:
        """Values that must survive: outputs and updates."""
        return {*self.outputs.values(), *self.updates.values()}

    def sources(self) -> Iterator[str]:
        """Values that no node computes."""
        yield from self.inputs
        yield from self.scalars
        yield from self.params
        yield from self.consts

    def with_(self, **changes: Any) -> Graph:
        """A copy with some fields replaced."""
        return replace(self, **changes)

    def check(self) -> Graph:
        """Raise InternalError unless every value is typed and defined once before its use."""
        defined = set()
        for name in self.sources():
            if name in defined:
                raise InternalError(f"{self.name}: '{name}' is defined twice")
            defined.add(name)
        for node in self.nodes:
            missing = [i for i in node.inputs if i not in defined]
            if missing:
                raise InternalError(f"{self.name}: {node} reads {missing} before definition")
            for out in node.outputs:
                if out in defined:
                    raise InternalError(f"{self.name}: '{out}' is defined twice")
                defined.add(out)
        untyped = [n for n in defined if n not in self.values]
        if untyped:
            raise InternalError(f"{self.name}: values without a type: {untyped[:5]}")
        lost = [r for r in self.results() if r not in defined]
        if lost:
            raise InternalError(f"{self.name}: results nobody computes: {lost[:5]}")
        for name, array in self.consts.items():
            if tuple(array.shape) != self.values[name].shape:
                raise InternalError(f"{self.name}: constant '{name}' has shape {array.shape}")
        return self

    def __str__(self) -> str:
        lines = [f"program {self.name}"]
        lines += [f"  input {self.values[i]}" for i in self.inputs]
        lines += [f"  scalar %{s} = {f}" for s, f in self.scalars.items()]
        lines += [f"  {p.kind} {self.values[n]}" for n, p in self.params.items()]
        lines += [f"  const {self.values[c]}" for c in self.consts]
        for node in self.nodes:
            types = ", ".join(str(self.values[o]) for o in node.outputs)
            lines.append(f"  {node}".replace("\n", "\n  ") + f"  -> {types}")
        lines += [f"  update %{p} <- %{v}" for p, v in self.updates.items()]
        lines += [f"  return {k}: %{v}" for k, v in self.outputs.items()]
        return "\n".join(lines)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
