"""The input gradient of a convolution, which is also a transposed convolution's forward.

For stride 1 it is a convolution with flipped taps and swapped channels; for stride s it is s x s of
them, one for each phase of the gradient's pixels, with only the taps that reach it: a quarter of
the work of inserting zeros, for stride 2. The loop nest is schedule/direct.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pocktvm.schedule import emit
from pocktvm.schedule.direct import Direct, Tile, Weights, emit_direct
from pocktvm.schedule.inplace import inplace_pairs
from pocktvm.schedule.loops import ceil_div
from pocktvm.schedule.rule import Emitted, Knob, Pack, Task
from pocktvm.schedule.rules.conv import tile_knobs
from pocktvm.schedule.spatial import anchor_of, decline_spatial, outer
from pocktvm.schedule.transpose import Matrix, copy_transposed
from pocktvm.schedule.window import Window
from pocktvm.tvm_api import T

Expr = Any


class ConvInputGrad:
    """dx = conv2d_input_grad(dy, w), NHWC and HWIO, with an elementwise epilogue."""

    name = "conv_input_grad"

    def decline(self, task: Task) -> str | None:
        """Declines other operators, layouts and types."""
        return decline_spatial(task, "conv2d_input_grad")

    def knobs(self, task: Task) -> Mapping[str, Knob]:
        """The register tile, as a forward convolution's."""
        return tile_knobs(describe(task), task)

    def emit(self, task: Task, knobs: Mapping[str, Any]) -> Emitted:
        """Weights are read as panels over input channels: packed at build time when frozen, in
        the kernel's first loop, to a workspace, when trained."""
        conv, tile, node = describe(task), Tile(**knobs), anchor_of(task)
        weight = node.inputs[1]
        frozen = task.is_frozen(weight)
        pack: dict[int, Pack] = {}
        workspaces: tuple[tuple[int, str], ...] = ()
        if frozen:
            params = {"nr": tile.nr, "groups": conv.groups, "swap": True}
            pack[task.node.inputs.index(weight)] = Pack("conv_panels", params)
        else:
            workspaces = ((task.values[weight].size, "float32"),)

        def body(ctx: emit.Context) -> None:
            buffer = ctx.buffers[weight]
            if not frozen:
                emit_swap(ctx, conv, tile, buffer, ctx.workspaces[0])
                buffer = ctx.workspaces[0]
            emit_direct(ctx, conv, Weights(buffer, True), tile)

        func = emit.build(task, body, workspaces)
        return Emitted(func, workspaces, inplace_pairs(task), pack, 2 * conv.macs)


def describe(task: Task) -> Direct:
    """The input gradient of a task: dy is the source, dx the result."""
    node = anchor_of(task)
    dy, w, dx = (task.shape(name) for name in (*node.inputs[:2], node.outputs[0]))
    window = Window.of(node.attrs)
    rows, columns = window.gradient(dx[1:3], dy[1:3], w[:2])
    phases = tuple((r, c) for r in rows for c in columns)
    return Direct(node.inputs[0], node.outputs[0], dy, dx, (w[0], w[1]), window.groups, phases)


def emit_swap(ctx: emit.Context, conv: Direct, tile: Tile, weight: Any, panels: Any) -> None:
    """The packer `conv_panels(swap=True)` as a loop: HWIO to [group][panel][tap][O][I panel]."""
    taps = conv.kernel[0] * conv.kernel[1]
    total = conv.groups * conv.depth
    count = ceil_div(conv.width, tile.nr)
    with outer(ctx.task, conv.groups * count, nbytes=4 * taps * conv.width * total) as f:
        group, panel = T.bind(f // count), T.bind(f % count)
        base = T.bind((group * conv.width + panel * tile.nr) * (taps * conv.depth))

        def copy(width: int) -> None:
            with T.serial(0, taps) as t:
                source = (t * conv.width + panel * tile.nr) * total + group * conv.depth
                target = T.bind(base + t * (conv.depth * width))
                copy_transposed(
                    Matrix(weight, T.bind(source), total), Matrix(panels, target, width),
                    width, conv.depth, ctx.lanes,
                )  # fmt: skip

        tail = conv.width % tile.nr
        if not tail or count == 1:
            copy(tail or tile.nr)
            return
        with T.If(panel < count - 1):
            with T.Then():
                copy(tile.nr)
            with T.Else():
                copy(tail)
