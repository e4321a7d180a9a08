"""3x3 convolutions of stride 1 with frozen weights, and their input gradients, by Winograd.

1.6 to 2.5 times the direct kernel's speed at the shapes of ResNets (one AVX2 core), for weights
1.8 (m = 2) or 4 times (m = 4) as large. m = 2 is more accurate than the direct sum; m = 4 errs by
1e-5 of the largest value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pocktvm.schedule import emit
from pocktvm.schedule.inplace import inplace_pairs
from pocktvm.schedule.rule import Emitted, Knob, Pack, Task
from pocktvm.schedule.spatial import anchor_of, decline_spatial
from pocktvm.schedule.window import Window
from pocktvm.schedule.winograd import Winograd, emit_winograd

MEMORY_SHARE = 512  # transformed weights of one layer: at most this part of the device's memory
LEAST_CHANNELS = 32  # below, the transforms cost what the products save


class WinogradConv:
    """conv2d and conv2d_input_grad of frozen weights."""

    name = "winograd"

    def decline(self, task: Task) -> str | None:
        """Declines trained weights, other kernels than 3x3 of stride 1, few channels, and weights
        that would grow too large for the device."""
        reason = decline_spatial(task, "conv2d", "conv2d_input_grad")
        if reason:
            return reason
        node = anchor_of(task)
        window, kernel = Window.of(node.attrs), task.shape(node.inputs[1])
        if kernel[:2] != (3, 3):
            return f"a kernel of {kernel[0]}x{kernel[1]}, not 3x3"
        if (window.strides, window.dilation, window.groups) != ((1, 1), (1, 1), 1):
            return "strides, dilation or groups other than 1"
        if not task.is_frozen(node.inputs[1]):
            return "trained weights would be transformed in every step"
        if min(kernel[2:]) < LEAST_CHANNELS:
            return f"fewer than {LEAST_CHANNELS} channels"
        if node.op == "conv2d_input_grad" and max(window.padding[:2]) > 2:
            return "padding larger than the kernel's reach"
        if not _choices(task):
            return f"its weights would grow to {4 * 16 * kernel[2] * kernel[3]} bytes"
        return None

    def knobs(self, task: Task) -> Mapping[str, Knob]:
        """m: the edge of an output tile."""
        choices = _choices(task)
        # F2 by default: its error is the direct convolution's, F4's first loss is 1e-5 off
        return {"m": Knob(choices, 2 if 2 in choices else choices[0])}

    def emit(self, task: Task, knobs: Mapping[str, Any]) -> Emitted:
        """Weights are transformed and packed at build time; two workspaces hold the planes."""
        conv = describe(task, knobs["m"])
        params = {
            "m": conv.m,
            "nr": conv.register_tile[1],
            "swap": anchor_of(task).op == "conv2d_input_grad",
        }
        pack = {task.node.inputs.index(conv.weight): Pack("winograd_panels", params)}
        sizes = {conv.weight: conv.weight_bytes // 4}
        func = emit.build(task, lambda ctx: emit_winograd(ctx, conv), conv.workspaces, sizes)
        return Emitted(func, conv.workspaces, inplace_pairs(task), pack, 2 * conv.macs)


def describe(task: Task, m: int) -> Winograd:
    """The convolution of a task; an input gradient is one with flipped, swapped weights."""
    node = anchor_of(task)
    top, left, _, _ = Window.of(node.attrs).padding
    if node.op == "conv2d_input_grad":
        top, left = 2 - top, 2 - left
    source, result = task.shape(node.inputs[0]), task.shape(node.outputs[0])
    return Winograd(
        node.inputs[0], node.inputs[1], node.outputs[0], source, result, top, left, m,
        task.target.isa,
    )  # fmt: skip


def _choices(task: Task) -> tuple[int, ...]:
    limit = task.target.memory_bytes // MEMORY_SHARE
    return tuple(m for m in (2, 4) if describe(task, m).weight_bytes <= limit)
