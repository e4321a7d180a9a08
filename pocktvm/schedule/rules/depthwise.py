"""Depthwise convolution (one filter a channel) and its input gradient (schedule/depthwise.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pocktvm.schedule import emit
from pocktvm.schedule.depthwise import Depthwise, Tile, emit_depthwise
from pocktvm.schedule.depthwise_weight_grad import Plan, emit_depthwise_weight_grad
from pocktvm.schedule.depthwise_weight_grad import Tile as WeightGradTile
from pocktvm.schedule.depthwise_weight_grad import choose_tile as weight_grad_tile
from pocktvm.schedule.inplace import inplace_pairs
from pocktvm.schedule.loops import ceil_div
from pocktvm.schedule.prefetch import streams
from pocktvm.schedule.rule import Emitted, Knob, Task
from pocktvm.schedule.rules.conv_weight_grad import describe as describe_weight_grad
from pocktvm.schedule.spatial import anchor_of, decline_spatial
from pocktvm.schedule.widening import Widening, widened
from pocktvm.schedule.window import Axis, Window


class DepthwiseConv:
    """y = conv2d(x, w) with groups = channels in = channels out."""

    name = "depthwise"
    op = "conv2d"

    def decline(self, task: Task) -> str | None:
        """Declines dense and grouped convolutions, other layouts and types."""
        reason = decline_spatial(task, self.op)
        if reason is None:
            node = anchor_of(task)
            reason = decline_groups(task, task.shape(node.inputs[0])[3], node.outputs[0])
        return reason

    def knobs(self, task: Task) -> Mapping[str, Knob]:
        """The register tile."""
        tile = self.tile(task)
        return {
            "pixels": Knob.around(tile.pixels, 1, 2, 4, 8),
            "vectors": Knob.around(tile.vectors, 1, 2, 4),
        }

    def emit(self, task: Task, knobs: Mapping[str, Any]) -> Emitted:
        """Weights are read in place: [kh, kw, 1, C] is contiguous in the lanes' direction."""
        conv = self.describe(task)
        func = emit.build(task, lambda ctx: emit_depthwise(ctx, conv, Tile(**knobs)))
        return Emitted(func, inplace=inplace_pairs(task), flops=2 * conv.macs)

    def describe(self, task: Task) -> Depthwise:
        """The forward convolution of a task."""
        node = anchor_of(task)
        x, w, y = (task.shape(name) for name in (*node.inputs, node.outputs[0]))
        rows, columns = Window.of(node.attrs).forward(y[1:3], x[1:3], w[:2])
        return _described(task, ((rows, columns),))

    def tile(self, task: Task) -> Tile:
        """8 pixels of one vector share the weights; strides share less, wide maps are bound by
        memory, which 4 ask for more evenly (measured with AVX2 and AVX-512)."""
        conv = self.describe(task)
        if streams(task, conv.source) and conv.result_shape[2] > 8:
            return fit_tile(task, conv, (4, 1))
        if conv.phases[0][1].step == 1:
            return fit_tile(task, conv, (8, 1))
        return fit_tile(task, conv, (2, 2) if conv.result_shape[2] >= 32 else (4, 1))


class DepthwiseInputGrad(DepthwiseConv):
    """dx = conv2d_input_grad(dy, w) with groups = channels: phases, each with its own taps."""

    name = "depthwise_input_grad"
    op = "conv2d_input_grad"

    def describe(self, task: Task) -> Depthwise:
        """The input gradient of a task."""
        node = anchor_of(task)
        dy, w, dx = (task.shape(name) for name in (*node.inputs, node.outputs[0]))
        rows, columns = Window.of(node.attrs).gradient(dx[1:3], dy[1:3], w[:2])
        phases = tuple((r, c) for r in rows for c in columns)
        return _described(task, phases)

    def tile(self, task: Task) -> Tile:
        """8 pixels of one vector; 3 x 2 for phases of wide maps."""
        conv = self.describe(task)
        phases = len(conv.phases) > 1 and conv.result_shape[2] >= 32
        return fit_tile(task, conv, (3, 2) if phases else (8, 1))


def _described(task: Task, phases: tuple[tuple[Axis, Axis], ...]) -> Depthwise:
    node = anchor_of(task)
    (source, weight), result = node.inputs[:2], node.outputs[0]
    kh, kw = task.shape(weight)[:2]
    return Depthwise(
        source, weight, result, task.shape(source), task.shape(result), (kh, kw), phases
    )


def decline_groups(task: Task, channels: int, other: str) -> str | None:
    """Why a convolution is not depthwise."""
    node = anchor_of(task)
    if not int(node.attrs.get("groups", 1)) == channels == task.shape(other)[3]:
        return "not depthwise: groups, channels in and channels out differ"
    return None


def fit_tile(task: Task, conv: Depthwise, wish: Sequence[int]) -> Tile:
    """The wished (pixels, vectors), moved towards pixels where there are few channels."""
    pixels, vectors = wish
    if task.target.isa.vector_registers <= 16 and task.target.isa.lanes <= 4:
        pixels, vectors = 4, 1  # ARMv7: 2.8 instructions a multiply-add, 5.1 with more
    have = max(1, ceil_div(conv.result_shape[3], task.target.isa.lanes))
    if have < vectors:
        pixels, vectors = pixels * vectors // have, have
    return Tile(min(pixels, max(columns.out for _, columns in conv.phases)), vectors)


class DepthwiseWeightGrad:
    """dw = conv2d_weight_grad(x, dy) with groups = channels (schedule/depthwise_weight_grad.py)."""

    name = "depthwise_weight_grad"

    def decline(self, task: Task) -> str | None:
        """Declines dense and grouped convolutions, other layouts and types."""
        reason = decline_spatial(task, "conv2d_weight_grad", inside=widened(task))
        if reason is None:
            node = anchor_of(task)
            reason = decline_groups(task, task.shape(node.inputs[0])[3], node.inputs[1])
        return reason

    def knobs(self, task: Task) -> Mapping[str, Knob]:
        """Pixels written out, channel vectors, kernel rows at a time."""
        tile = weight_grad_tile(describe_weight_grad(task), task.target.isa)
        return {
            "pixels": Knob((4, 2, 8), tile.pixels),
            "vectors": Knob.around(tile.vectors, 1, 2),
            "lines": Knob((tile.lines,), tile.lines),
        }

    def emit(self, task: Task, knobs: Mapping[str, Any]) -> Emitted:
        """Workspace: each worker's sums. A narrow image is widened where it is loaded."""
        plan = Plan(describe_weight_grad(task), WeightGradTile(**knobs), task.target.isa)
        wide = widened(task)

        def body(ctx: emit.Context) -> None:
            emit_depthwise_weight_grad(Widening.of(ctx, wide) if wide else ctx, plan)

        func = emit.build(task, body, plan.workspaces)
        return Emitted(func, plan.workspaces, inplace_pairs(task), flops=2 * plan.grad.macs)
