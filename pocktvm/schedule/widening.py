"""A kernel's operand that lies narrow in memory and is widened as it is loaded.

What waits for the backward pass as bfloat16 or in a byte (passes/narrow_saved.py) needs no wide
copy where a rule reads it by vectors: the group's body begins with the operator that widens it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pocktvm.ir.graph import Node
from pocktvm.schedule.elementwise_ops import OPS
from pocktvm.schedule.emit import Context, load
from pocktvm.schedule.rule import Task
from pocktvm.tvm_api import T


def widened(task: Task) -> dict[str, Node]:
    """Values that the group widens ahead of its anchor, by name."""
    ahead = task.node.body[: task.node.attrs["anchor"]] if task.node.body else ()
    narrow = [n for n in ahead if n.op in ("unpack_bf16", "unpack_u8")]
    return {n.outputs[0]: n for n in narrow if n.inputs[0] in task.node.inputs}


@dataclass
class Widening(Context):
    """A context in which some values are loaded through what widens them."""

    nodes: Mapping[str, Node]

    @classmethod
    def of(cls, ctx: Context, nodes: Mapping[str, Node]) -> Widening:
        """The context, with these values."""
        return cls(ctx.task, ctx.buffers, ctx.workspaces, nodes)

    def load(self, name: str, index: Any, width: int) -> Any:
        """Elements of an argument, or of the wide form of one."""
        node = self.nodes.get(name)
        if node is None:
            return super().load(name, index, width)
        narrow = load(self.buffers[node.inputs[0]], index, width)
        return T.bind(OPS[node.op]([narrow], node.attrs, width, "float32"))
