"""3x3 convolutions of stride 1 and both their gradients by Winograd.

1.6 to 2.5 times the direct kernel's speed at the shapes of ResNets (one AVX2 core), for weights
1.8 (m = 2) or 4 times (m = 4) as large. m = 2 is more accurate than the direct sum; m = 4 errs
twice as much as it: 1.1 to 2.4e-6 of the largest value at 64 to 256 channels, torch 0.6 to 1.2e-6.
Weights that learn are transformed in every step, which pays where the image has enough pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pocktvm.schedule import emit
from pocktvm.schedule.inplace import inplace_pairs
from pocktvm.schedule.rule import Emitted, Knob, Pack, Task
from pocktvm.schedule.rules import conv_weight_grad
from pocktvm.schedule.spatial import anchor_of, decline_spatial
from pocktvm.schedule.window import Axis, Window
from pocktvm.schedule.winograd import Winograd, emit_winograd
from pocktvm.schedule.winograd_weight_grad import WinogradWeightGrad, emit_winograd_weight_grad

MEMORY_SHARE = 512  # transformed weights of one layer: at most this part of the device's memory
LEAST_CHANNELS = 32  # below, the transforms cost what the products save
LEAST_TILES = 12  # of F4: below, its larger weights are read for too few products
COST = 16  # operations that moving one value of a large transformed weight costs (11 to 16)


class WinogradConv:
    """conv2d and conv2d_input_grad."""

    name = "winograd"

    def decline(self, task: Task) -> str | None:
        """Declines other kernels than 3x3 of stride 1, few channels, learning weights of small
        images, and weights that would grow too large for the device."""
        reason = _decline(task, "conv2d", "conv2d_input_grad")
        if reason:
            return reason
        node = anchor_of(task)
        learned = not task.is_frozen(node.inputs[1])
        if learned and _gain(task, node.outputs[0], node.inputs[0]) < 1:
            return "transforming weights that learn would cost more than the products save"
        if node.op == "conv2d_input_grad" and max(Window.of(node.attrs).padding[:2]) > 2:
            return "padding larger than the kernel's reach"
        return None

    def knobs(self, task: Task) -> Mapping[str, Knob]:
        """`m`: an output tile's edge; 4 where there are tiles enough to read its weights for."""
        return _knobs(task)

    def emit(self, task: Task, knobs: Mapping[str, Any]) -> Emitted:
        """Weights are transformed and packed at build time where they are frozen; workspaces hold
        the planes."""
        conv = describe(task, knobs["m"])
        params = {"m": conv.m, "nr": conv.register_tile[1], "swap": conv.swap}
        pack, sizes = {}, {}
        if not conv.learned:
            pack = {task.node.inputs.index(conv.weight): Pack("winograd_panels", params)}
            sizes = {conv.weight: conv.weight_bytes // 4}
        func = emit.build(task, lambda ctx: emit_winograd(ctx, conv), conv.workspaces, sizes)
        return Emitted(func, conv.workspaces, inplace_pairs(task), pack, 2 * conv.macs)


class WinogradWeight:
    """conv2d_weight_grad, with an epilogue such as the update of w."""

    name = "winograd_weight_grad"

    def decline(self, task: Task) -> str | None:
        """Declines other kernels than 3x3 of stride 1, few channels, small images, and sums that
        would grow too large for the device."""
        reason = _decline(task, "conv2d_weight_grad")
        if reason:
            return reason
        node = anchor_of(task)
        if _gain(task, node.inputs[1], node.inputs[0]) < 1:
            return "transforming the sums would cost more than the products save"
        return None

    def knobs(self, task: Task) -> Mapping[str, Knob]:
        """`m`: the edge of an output tile."""
        return _knobs(task)

    def emit(self, task: Task, knobs: Mapping[str, Any]) -> Emitted:
        """Three workspaces: transformed x and dy of a block, and the sums."""
        grad, padding = conv_weight_grad.describe(task), Window.of(anchor_of(task).attrs).padding
        conv = WinogradWeightGrad(grad, *padding[:2], knobs["m"], task.target.isa)
        func = emit.build(
            task, lambda ctx: emit_winograd_weight_grad(ctx, conv), conv.workspaces
        )
        return Emitted(func, conv.workspaces, inplace_pairs(task), flops=2 * grad.macs)


def describe(task: Task, m: int) -> Winograd:
    """The convolution of a task; an input gradient is one with flipped, swapped weights."""
    node = anchor_of(task)
    top, left, _, _ = Window.of(node.attrs).padding
    if node.op == "conv2d_input_grad":
        top, left = 2 - top, 2 - left
    source, result = task.shape(node.inputs[0]), task.shape(node.outputs[0])
    learned = () if task.is_frozen(node.inputs[1]) else task.shape(node.inputs[1])
    return Winograd(
        node.inputs[0], node.inputs[1], node.outputs[0], source, result, top, left, m,
        task.target.isa, learned, node.op == "conv2d_input_grad",
    )  # fmt: skip


def _decline(task: Task, *ops: str) -> str | None:
    reason = decline_spatial(task, *ops)
    if reason:
        return reason
    window, kernel = Window.of(anchor_of(task).attrs), _kernel(task)
    if kernel[:2] != (3, 3):
        return f"a kernel of {kernel[0]}x{kernel[1]}, not 3x3"
    if (window.strides, window.dilation, window.groups) != ((1, 1), (1, 1), 1):
        return "strides, dilation or groups other than 1"
    if min(kernel[2:]) < LEAST_CHANNELS:
        return f"fewer than {LEAST_CHANNELS} channels"
    if not _choices(task):
        return f"its weights would grow to {_weight_bytes(task, 2)} bytes"
    return None


def _kernel(task: Task) -> tuple[int, ...]:
    node = anchor_of(task)
    return task.shape(node.outputs[0] if node.op == "conv2d_weight_grad" else node.inputs[1])


def _weight_bytes(task: Task, m: int) -> int:
    return 4 * (m + 2) ** 2 * math.prod(_kernel(task)[2:])


def _choices(task: Task) -> tuple[int, ...]:
    limit = task.target.memory_bytes // MEMORY_SHARE
    return tuple(m for m in (2, 4) if _weight_bytes(task, m) <= limit)


def _knobs(task: Task) -> dict[str, Knob]:
    choices = _choices(task)
    node = anchor_of(task)
    best = choices[0]
    if 4 in choices and 2 in choices:
        n, h, w, _ = task.shape(node.inputs[1 if node.op == "conv2d_weight_grad" else 0])
        large, small = (n * math.ceil(h / m) * math.ceil(w / m) for m in (4, 2))
        if large >= LEAST_TILES and 36 * large < 0.8 * 16 * small:
            best = 4
    return {"m": Knob(choices, best)}


def _gain(task: Task, result: str, source: str) -> float:
    """Operations that F2 saves for one pair of channels, over what its transforms cost."""
    (n, oh, ow, _), (_, h, w, _) = task.shape(result), task.shape(source)
    window = Window.of(anchor_of(task).attrs)
    direct = n
    for out, size, before in ((oh, h, window.padding[0]), (ow, w, window.padding[1])):
        axis = Axis(out, size, 1, 3, -before)
        direct *= sum(axis.valid(o, tap) for o in range(out) for tap in range(3))
    transformed = 16 * n * math.ceil(oh / 2) * math.ceil(ow / 2)
    return 2 * (direct - transformed) / (COST * (9 + 2 * 16))
