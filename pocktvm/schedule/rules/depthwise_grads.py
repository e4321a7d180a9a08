"""Both gradients of a depthwise convolution as one kernel: a group of passes/join_gradients.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pocktvm.ir.graph import Node
from pocktvm.schedule import emit
from pocktvm.schedule.depthwise_grads import Parts, emit_depthwise_grads
from pocktvm.schedule.depthwise_walk import Grads, Plan
from pocktvm.schedule.emit import Context
from pocktvm.schedule.fused_block import part_task
from pocktvm.schedule.inplace import inplace_pairs
from pocktvm.schedule.prefetch import streams
from pocktvm.schedule.rule import Emitted, Knob, Task
from pocktvm.schedule.rules.depthwise import DepthwiseInputGrad, DepthwiseWeightGrad
from pocktvm.schedule.rules.reduce import Reduce
from pocktvm.schedule.spatial import anchor_of
from pocktvm.schedule.window import Window

KIND = "depthwise_grads"


class DepthwiseGrads:
    """dx, dw and the sums of dy and of the masked dx."""

    name = "depthwise_grads"

    def decline(self, task: Task) -> str | None:
        """Declines other groups, and parts that their own rules decline."""
        if task.node.attrs.get("kind") != KIND:
            return "no gradients of one depthwise convolution"
        for node in task.node.body:
            part = part_task(task, node)
            reason = _part_rule(anchor_of(part)).decline(part)
            if reason is not None:
                return reason
        grads = describe(task)
        if grads.dy_sum and grads.once is None:
            return "no tap meets every pixel of dy"
        return None

    def knobs(self, task: Task) -> Mapping[str, Knob]:
        """The register tile: pixels of dx x channel vectors."""
        grads, isa = describe(task), task.target.isa
        stride = len(grads.columns)
        wish = 8 if isa.vector_registers >= 32 else 4
        if isa.lane_fma and stride == 1:
            wish = min(wish, 6)  # 8 spill: weights are registers there, not operands in memory
        if stride == 1 and grads.dx_shape[2] > 8 and streams(task, grads.x):
            wish = 4  # rows come from main memory: shorter tiles ask for it more evenly
        pixels = max(stride, wish // stride * stride)
        narrower = (stride * n for n in (1, 2, 4))
        return {"pixels": Knob.around(pixels, *narrower), "vectors": Knob((1, 2), 1)}

    def emit(self, task: Task, knobs: Mapping[str, Any]) -> Emitted:
        """Workspace: the sums of every band of rows."""
        plan = Plan(describe(task), knobs["pixels"], knobs["vectors"], task.target.isa)

        def body(ctx: Context) -> None:
            found = {}
            for node in task.node.body:
                part = part_task(task, node)
                result = anchor_of(part).outputs[0]
                found[result] = Context(part, ctx.buffers, ctx.workspaces)
            emit_depthwise_grads(Parts(ctx, found), plan)

        func = emit.build(task, body, plan.workspaces)
        return Emitted(func, plan.workspaces, _inplace(task), flops=2 * plan.grads.macs)


def _part_rule(anchor: Node) -> Any:
    rules: dict[str, Any] = {
        "conv2d_input_grad": DepthwiseInputGrad(), "conv2d_weight_grad": DepthwiseWeightGrad(),
        "sum": Reduce(),
    }  # fmt: skip
    return rules[anchor.op]


def describe(task: Task) -> Grads:
    """What a group computes; its parts are known to be fit."""
    anchors = {node.outputs: anchor_of(part_task(task, node)) for node in task.node.body}
    found = {anchor.op: anchor for anchor in anchors.values() if anchor.op != "sum"}
    gradient, weight = found["conv2d_input_grad"], found["conv2d_weight_grad"]
    (dy, w), dx = gradient.inputs[:2], gradient.outputs[0]
    sums = {anchor.inputs[0]: anchor.outputs[0] for anchor in anchors.values()
            if anchor.op == "sum"}  # fmt: skip
    z = next((name for name in sums if name != dy), dx)
    dx_shape, dy_shape, kernel = task.shape(dx), task.shape(dy), task.shape(w)[:2]
    rows, columns = Window.of(gradient.attrs).gradient(dx_shape[1:3], dy_shape[1:3], kernel)
    return Grads(
        dy, w, dx, weight.inputs[0], weight.outputs[0], z, sums.get(dy, ""), sums.get(z, ""),
        dx_shape, dy_shape, (kernel[0], kernel[1]), tuple(rows), tuple(columns),
    )  # fmt: skip


def _inplace(task: Task) -> tuple[tuple[int, int], ...]:
    """Each part's own pairs, of operands that no part reads later: dx may lie over x, which is read
    at the same pixel, and the sums, which are written last, over what the walk has read."""
    node, pairs, x = task.node, [], describe(task).x
    for part_node in node.body:
        part = part_task(task, part_node)
        walk = anchor_of(part).op == "conv2d_input_grad"
        others = [p for p in node.body if p is not part_node]
        if not walk:
            others = [p for p in others if anchor_of(part_task(task, p)).op != "conv2d_input_grad"]
        later = {name for p in others for name in p.inputs} - ({x} if walk else set())
        for o, i in inplace_pairs(part):
            name = part.node.inputs[i]
            if name not in later:
                output = node.outputs.index(part.node.outputs[o])
                pairs.append((output, node.inputs.index(name)))
    return tuple(pairs)
