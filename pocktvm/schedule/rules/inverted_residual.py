"""Frozen inverted residual blocks as one kernel (schedule/fused_block.py).

Declined, and the three parts become kernels of their own, where that is better: the intermediate
values fit the cache anyway, the ring of expanded rows does not fit it, or the scratch of all
workers would be more memory than what is saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pocktvm.schedule import emit
from pocktvm.schedule.depthwise import Tile
from pocktvm.schedule.fused_block import Block, anchor_node, take_apart, traffic_bytes
from pocktvm.schedule.gemm_tile import register_tile
from pocktvm.schedule.inplace import inplace_pairs
from pocktvm.schedule.rule import Emitted, Knob, Pack, Task
from pocktvm.schedule.rules.depthwise import DepthwiseConv

KIND = "inverted_residual"


class InvertedResidual:
    """y = project(depthwise(expand(x))), each with its epilogue: a group of passes/fuse_blocks."""

    name = "inverted_residual"

    def decline(self, task: Task) -> str | None:
        """Declines other groups, and blocks that are better off as three kernels."""
        if task.node.attrs.get("kind") != KIND:
            return "no inverted residual"
        saved = traffic_bytes(task)
        if saved <= task.target.isa.l2_bytes:
            return f"its {saved} bytes between the operators stay in cache anyway"
        block = describe(task)
        if 4 * block.scratch > task.target.isa.l2_bytes * 3 // 4:
            return f"{4 * block.scratch} bytes of rows do not fit the second-level cache"
        if 4 * block.scratch * block.workers > saved:
            return "the workers' scratch is more memory than it saves"
        return None

    def knobs(self, task: Task) -> Mapping[str, Knob]:
        """The depthwise register tile."""
        return DepthwiseConv().knobs(take_apart(task)[1])

    def emit(self, task: Task, knobs: Mapping[str, Any]) -> Emitted:
        """Both matrices are packed; the scratch of all workers is a workspace."""
        block = describe(task, Tile(**knobs))
        workspaces = ((block.workers * block.scratch, "float32"),)
        func = emit.build(task, block.emit, workspaces)
        return Emitted(func, workspaces, _inplace(task, block), _packs(task, block), block.flops)


def describe(task: Task, tile: Tile | None = None) -> Block:
    """The block of a task."""
    expand, depthwise, project = take_apart(task)
    rule = DepthwiseConv()
    conv = rule.describe(depthwise)
    return Block(task, expand, depthwise, project, conv, tile or rule.tile(depthwise))


def _packs(task: Task, block: Block) -> dict[int, Pack]:
    """Panels as wide as the register tile of one row's product."""
    packs = {}
    widths = (block.conv.source_shape[2], block.conv.result_shape[2])
    for part, pixels in zip((block.expand, block.project), widths, strict=True):
        gemm = block.row_product(part, pixels)
        if gemm is not None:
            nr = min(register_tile(block.isa, gemm)[1], gemm.n)
            packs[task.node.inputs.index(gemm.b)] = Pack("panels", {"nr": nr, "transpose": False})
    return packs


def _inplace(task: Task, block: Block) -> tuple[tuple[int, int], ...]:
    """What only the last epilogue reads may be written over; other rows still read the input."""
    early = {name for part in task.node.body[:-1] for name in part.inputs}
    early.update(anchor_node(block.project).inputs)
    inner = block.project.node.inputs
    pairs = ((o, inner[i]) for o, i in inplace_pairs(block.project))
    return tuple((o, task.node.inputs.index(name)) for o, name in pairs if name not in early)
