"""The weight gradient of a convolution, dense and grouped (schedule/weight_grad.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pocktvm.schedule import emit
from pocktvm.schedule.inplace import inplace_pairs
from pocktvm.schedule.rule import Emitted, Knob, Task
from pocktvm.schedule.spatial import anchor_of, decline_spatial
from pocktvm.schedule.weight_grad import Plan, Tile, WeightGrad, choose_tile, emit_weight_grad
from pocktvm.schedule.weight_grad_walk import emit_weight_grad_walk
from pocktvm.schedule.window import Window


class ConvWeightGrad:
    """dw = conv2d_weight_grad(x, dy), with an epilogue such as the update of w."""

    name = "conv_weight_grad"

    def decline(self, task: Task) -> str | None:
        """Declines other operators, layouts and types."""
        return decline_spatial(task, "conv2d_weight_grad")

    def knobs(self, task: Task) -> Mapping[str, Knob]:
        """The register tile and the pixels of a block."""
        tile, lanes = choose_tile(describe(task), task.target.isa), task.target.isa.lanes
        return {
            "mr": Knob.around(tile.mr, 4, 6, 8, 12),
            "nr": Knob.around(tile.nr, lanes, 2 * lanes, 3 * lanes, 4 * lanes),
            "block": Knob.around(tile.block, 64, 128, 256, 512),
        }

    def emit(self, task: Task, knobs: Mapping[str, Any]) -> Emitted:
        """Workspaces: each worker's sums and panel of dy."""
        plan = Plan(describe(task), Tile(**knobs), task.target.isa)
        write = emit_weight_grad_walk if plan.strips else emit_weight_grad
        func = emit.build(task, lambda ctx: write(ctx, plan), plan.workspaces)
        pairs = inplace_pairs(task)
        return Emitted(func, plan.workspaces, pairs, flops=2 * plan.grad.macs)


def describe(task: Task) -> WeightGrad:
    """The weight gradient of a task."""
    node = anchor_of(task)
    x, dy, dw = (task.shape(name) for name in (*node.inputs[:2], node.outputs[0]))
    window = Window.of(node.attrs)
    rows, columns = window.forward(dy[1:3], x[1:3], dw[:2])
    return WeightGrad(
        node.inputs[0], node.inputs[1], node.outputs[0], x, dy, dw, window.groups, rows, columns
    )
