"""Nearest and bilinear resizing of NHWC maps, and the gradients, which gather.

Source positions are computed as torch does, in float32, so that both round to the same pixel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pocktvm.schedule import emit
from pocktvm.schedule.depthwise import Vectors, each_block
from pocktvm.schedule.emit import Context
from pocktvm.schedule.expression import Position, finish
from pocktvm.schedule.inplace import inplace_pairs
from pocktvm.schedule.rule import Emitted, Knobless, Task
from pocktvm.schedule.spatial import anchor_of, decline_spatial, outer
from pocktvm.tvm_api import T, tirx

Expr = Any
VECTORS = 4


class Resize(Knobless):
    """resize2d and resize2d_grad."""

    name = "resize"

    def decline(self, task: Task) -> str | None:
        """Declines other operators, layouts, types and methods (cubic)."""
        reason = decline_spatial(task, "resize2d", "resize2d_grad")
        if reason is None:
            method = anchor_of(task).attrs.get("method", "nearest")
            if not method.startswith(("nearest", "linear")):
                return f"method {method}"
        return reason

    def emit(self, task: Task, knobs: Mapping[str, Any]) -> Emitted:
        """One loop over images and rows, then columns, then channels."""
        func = emit.build(task, ResizeNest(task).emit)
        return Emitted(func, inplace=inplace_pairs(task))


@dataclass(frozen=True)
class Scale:
    """One axis: `large` is the forward's output extent, `small` its input's."""

    out: int
    src: int
    linear: bool
    align_corners: bool

    @property
    def factor(self) -> np.float32:
        """Source elements an output element."""
        if self.linear and self.align_corners:
            return np.float32(self.src - 1) / np.float32(self.out - 1) if self.out > 1 else _ZERO
        return np.float32(self.src) / np.float32(self.out)

    def source(self, o: Expr) -> list[tuple[Expr, Expr | None]]:
        """The source elements of output o with their shares (None: the whole)."""
        at = tirx.Cast("float32", o)
        factor, half = emit.const(float(self.factor)), emit.const(0.5)
        last = tirx.const(self.src - 1, "int32")
        if not self.linear:
            return [(T.bind(tirx.Min(tirx.Cast("int32", at * factor), last)), None)]
        if self.align_corners:
            place = at * factor
        else:
            place = tirx.Max((at + half) * factor - half, emit.const(0.0))
        place = T.bind(place)
        low = T.bind(tirx.Min(tirx.Cast("int32", place), last))
        share = T.bind(place - tirx.Cast("float32", low))
        high = T.bind(tirx.Min(low + 1, last))
        return [(low, T.bind(emit.const(1.0) - share)), (high, share)]

    def readers(self, element: Expr) -> tuple[Expr, Expr]:
        """Outputs [lo, hi) among which are all that read a source element."""
        if not self.factor:
            return 0, self.out
        inverse = emit.const(1.0 / float(self.factor))
        lo = tirx.Cast("int32", tirx.Cast("float32", element - 1) * inverse) - 2
        hi = tirx.Cast("int32", tirx.Cast("float32", element + 2) * inverse) + 3
        return (
            T.bind(tirx.Max(lo, tirx.const(0, "int32"))),
            T.bind(tirx.Min(hi, tirx.const(self.out, "int32"))),
        )

    def share(self, o: Expr, element: Expr) -> Expr:
        """How much of `element` output o reads."""
        total: Expr = emit.const(0.0)
        for index, part in self.source(o):
            part = emit.const(1.0) if part is None else part
            total = total + tirx.Select(index.equal(element), part, emit.const(0.0))
        return T.bind(total)


_ZERO = np.float32(0)


class ResizeNest:
    """The loop nest around one output pixel."""

    def __init__(self, task: Task) -> None:
        self.task, self.node = task, anchor_of(task)
        self.out = task.shape(self.node.outputs[0])
        self.source = task.shape(self.node.inputs[0])
        self.forward = self.node.op == "resize2d"
        large, small = (self.out, self.source) if self.forward else (self.source, self.out)
        linear = self.node.attrs.get("method", "nearest").startswith("linear")
        corners = bool(self.node.attrs.get("align_corners", False))
        self.rows, self.columns = (
            Scale(large[i], small[i], linear, corners) for i in (1, 2)
        )

    def emit(self, ctx: emit.Context) -> None:
        """Write the whole kernel: images and rows, columns, channels."""
        self.ctx = ctx
        n, h, w, c = self.out
        with outer(self.task, n * h, nbytes=4 * n * h * w * c) as f:
            self.n, self.y = T.bind(f // h), T.bind(f % h)
            rows = self.span(self.rows, self.y)
            with T.serial(0, w) as x:
                self.x = x
                columns = self.span(self.columns, x)
                body = self.interpolate if self.forward else self.gather
                each_block(c, ctx.lanes, VECTORS, lambda at, v: body(rows, columns, at, v))

    def element(self, ctx: Context, n: Expr, y: Expr, x: Expr, c: Expr) -> None:
        """One element alone: what a thread of a GPU does."""
        self.ctx, self.n, self.y, self.x = ctx, n, y, x
        body = self.interpolate if self.forward else self.gather
        body(self.span(self.rows, y), self.span(self.columns, x), c, [(0, 1)])

    def span(self, axis: Scale, at: Expr) -> Any:
        """Forward: what an output reads. Gradient: the outputs that may read an element."""
        return axis.source(at) if self.forward else axis.readers(at)

    def load(self, y: Expr, x: Expr, c: Expr, lanes: int) -> Expr:
        """A vector of the source."""
        _, h, w, channels = self.source
        return self.ctx.load(
            self.node.inputs[0], ((self.n * h + y) * w + x) * channels + c, lanes
        )

    def finish(self, c: Expr, value: Expr, lanes: int) -> None:
        """Epilogue and store of a vector."""
        row = (self.n * self.out[1] + self.y) * self.out[2] + self.x
        finish(self.ctx, {self.node.outputs[0]: value}, Position(self.out, row, c, lanes))

    def interpolate(self, rows: Any, columns: Any, c: Expr, vectors: Vectors) -> None:
        """One output pixel from one or four source pixels."""
        for start, lanes in vectors:
            lines = []
            for y, part in rows:
                line: Expr = None
                for x, share in columns:
                    value = self.load(y, x, c + start, lanes)
                    value = value if share is None else value * emit.splat(share, lanes)
                    line = value if line is None else line + value
                lines.append(line if part is None else line * emit.splat(part, lanes))
            self.finish(c + start, lines[0] if len(lines) == 1 else lines[0] + lines[1], lanes)

    def gather(self, rows: Any, columns: Any, c: Expr, vectors: Vectors) -> None:
        """One element of dx from every output pixel that read it."""
        acc = emit.local(vectors[-1][0] + vectors[-1][1])
        for start, lanes in vectors:
            emit.store(acc, start, emit.const(0.0, lanes), lanes)
        with T.serial(*rows) as oy:
            part = self.rows.share(oy, self.y)
            with T.If(part > emit.const(0.0)), T.Then(), T.serial(*columns) as ox:
                share = T.bind(part * self.columns.share(ox, self.x))
                with T.If(share > emit.const(0.0)), T.Then():
                    for start, lanes in vectors:
                        dy = self.load(oy, ox, c + start, lanes) * emit.splat(share, lanes)
                        emit.store(acc, start, emit.load(acc, start, lanes) + dy, lanes)
        for start, lanes in vectors:
            self.finish(c + start, emit.load(acc, start, lanes), lanes)
