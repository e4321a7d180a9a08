"""Convolution, dense and grouped: any kernel, stride, padding and dilation (schedule/direct.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pocktvm.schedule import emit
from pocktvm.schedule.direct import Direct, Tile, Weights, choose_tile, emit_direct
from pocktvm.schedule.dot import max_rows
from pocktvm.schedule.inplace import inplace_pairs
from pocktvm.schedule.rule import Emitted, Knob, Pack, Task
from pocktvm.schedule.spatial import anchor_of, decline_spatial
from pocktvm.schedule.window import Window


class Conv:
    """y = conv2d(x, w), NHWC and HWIO, with an elementwise epilogue."""

    name = "conv"

    def decline(self, task: Task) -> str | None:
        """Declines other operators, layouts and types."""
        return decline_spatial(task, "conv2d")

    def knobs(self, task: Task) -> Mapping[str, Knob]:
        """The register tile, the unrolling of k, and which of rows and panels is outside."""
        return tile_knobs(describe(task), task)

    def emit(self, task: Task, knobs: Mapping[str, Any]) -> Emitted:
        """Frozen weights are read from panels, trained ones where they are."""
        conv, tile, node = describe(task), Tile(**knobs), anchor_of(task)
        weight = node.inputs[1]
        pack = {}
        if task.is_frozen(weight):
            params = {"nr": tile.nr, "groups": conv.groups}
            pack[task.node.inputs.index(weight)] = Pack("conv_panels", params)

        def body(ctx: emit.Context) -> None:
            emit_direct(ctx, conv, Weights(ctx.buffers[weight], bool(pack)), tile)

        func, pairs = emit.build(task, body), inplace_pairs(task)
        return Emitted(func, pack=pack, inplace=pairs, flops=2 * conv.macs)


def describe(task: Task) -> Direct:
    """The forward convolution of a task."""
    node = anchor_of(task)
    x, w, y = (task.shape(name) for name in (*node.inputs[:2], node.outputs[0]))
    window = Window.of(node.attrs)
    rows, columns = window.forward(y[1:3], x[1:3], w[:2])
    return Direct(
        node.inputs[0], node.outputs[0], x, y, (w[0], w[1]), window.groups, ((rows, columns),)
    )


def tile_knobs(conv: Direct, task: Task) -> dict[str, Knob]:
    """Knobs named like Tile's fields, around the tile chosen by the model."""
    isa = task.target.isa
    best = choose_tile(conv, isa)
    limit = max(1, max_rows(isa, best.nr // isa.lanes))
    return {
        "pixels": Knob.around(best.pixels, *range(max(1, limit // 2), limit + 1)),
        "images": Knob.around(best.images),
        "nr": Knob.around(best.nr, isa.lanes, 2 * isa.lanes, 3 * isa.lanes, 4 * isa.lanes),
        "unroll": Knob.around(best.unroll, 1, 2, 4),
        "panels_outer": Knob.around(best.panels_outer, False, True),
    }
