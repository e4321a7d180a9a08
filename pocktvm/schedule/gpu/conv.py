"""Convolutions and their gradients as implicit matrix products (gpu/tile.py).

Window elements are gathered while a strip is copied to shared memory. With NHWC and HWIO, G groups
of C channels in and O out, and taps = kh kw:

    forward          M = pixels of y,   N = O,  K = taps C    A = x at the tap,   B = w
    input gradient   M = pixels of dx,  N = C,  K = taps O    A = dy at the tap,  B = w transposed
    weight gradient  M = taps C,        N = O,  K = pixels    A = x at the tap,   B = dy

Groups are the batch. An input gradient with stride s is s x s products, one for each phase of its
pixels, with only the taps that reach it (schedule/window.py): a quarter of the work, for stride 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pocktvm.schedule.emit import Context, build, const
from pocktvm.schedule.expression import Position, finish
from pocktvm.schedule.gpu.launch import choose
from pocktvm.schedule.gpu.tile import Product, emit_product, plan
from pocktvm.schedule.inplace import inplace_pairs
from pocktvm.schedule.rule import Emitted, Knobless, Task
from pocktvm.schedule.spatial import anchor_of, decline_spatial
from pocktvm.schedule.window import Axis, Window
from pocktvm.tvm_api import T, tirx

Expr = Any
Phase = tuple[Axis, Axis]
OPS = ("conv2d", "conv2d_input_grad", "conv2d_weight_grad")


@dataclass(frozen=True)
class Geometry:
    """Shapes of the convolution, whichever of its three products is computed: x NHWC, w HWIO (I
    of one group), y NHWC."""

    x: tuple[int, ...]
    w: tuple[int, ...]
    y: tuple[int, ...]
    window: Window

    @property
    def groups(self) -> int:
        """Independent convolutions side by side."""
        return self.window.groups

    @property
    def outputs(self) -> int:
        """Channels of y in one group."""
        return self.y[3] // self.groups

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Phases of the input gradient: rows and columns of x with the taps that reach them."""
        rows, columns = self.window.gradient(self.x[1:3], self.y[1:3], self.w[:2])
        return tuple((r, c) for r in rows for c in columns)

    @property
    def macs(self) -> int:
        """Multiplications of each of the three products, zeros of the padding included."""
        return math.prod(self.y[:3]) * math.prod(self.w[:2]) * self.w[2] * self.y[3]

    def source(self, oy: Expr, ox: Expr, ky: Expr, kx: Expr) -> tuple[Expr, Expr]:
        """The pixel of x that a tap meets at a pixel of y; may lie outside."""
        (sy, sx), (dy, dx) = self.window.strides, self.window.dilation
        top, left = self.window.padding[:2]
        return T.bind(oy * sy + ky * dy - top), T.bind(ox * sx + kx * dx - left)

    def reader(self, iy: Expr, ix: Expr, ky: Expr, kx: Expr) -> tuple[Expr, Expr, Expr]:
        """(condition, oy, ox): the pixel of y whose tap meets a pixel of x, where there is one."""
        (sy, sx), (dy, dx) = self.window.strides, self.window.dilation
        top, left = self.window.padding[:2]
        ty, tx = T.bind(iy + top - ky * dy), T.bind(ix + left - kx * dx)
        oy, ox = T.bind(tirx.FloorDiv(ty, sy)), T.bind(tirx.FloorDiv(tx, sx))
        there = within(oy, ox, self.y)
        if sy > 1:
            there = tirx.And(there, (oy * sy).equal(ty))
        if sx > 1:
            there = tirx.And(there, (ox * sx).equal(tx))
        return there, oy, ox


def within(y: Expr, x: Expr, shape: tuple[int, ...]) -> Expr:
    """Whether a pixel lies in an NHWC tensor."""
    rows = tirx.And(y >= 0, y < shape[1])
    return tirx.And(rows, tirx.And(x >= 0, x < shape[2]))


def pixel(flat: Expr, shape: tuple[int, ...]) -> tuple[Expr, Expr, Expr]:
    """(n, y, x) of a flat index over the pixels of an NHWC tensor."""
    x, rest = T.bind(flat % shape[2]), T.bind(flat // shape[2])
    return T.bind(rest // shape[1]), T.bind(rest % shape[1]), x


def offset(n: Expr, y: Expr, x: Expr, c: Expr, shape: tuple[int, ...]) -> Expr:
    """Flat index of an element of an NHWC tensor."""
    return ((n * shape[1] + y) * shape[2] + x) * shape[3] + c


def geometry(task: Task) -> Geometry:
    """The convolution of a task that computes any of its three products."""
    node = anchor_of(task)
    first, second = (task.shape(name) for name in node.inputs[:2])
    out, window = task.shape(node.outputs[0]), Window.of(node.attrs)
    x, w, y = {
        "conv2d": (first, second, out),
        "conv2d_input_grad": (out, second, first),
        "conv2d_weight_grad": (first, out, second),
    }[node.op]
    return Geometry(x, w, y, window)


class Conv(Knobless):
    """conv2d, conv2d_input_grad and conv2d_weight_grad: any kernel, stride, padding, dilation and
    groups, with an elementwise epilogue."""

    name = "conv"

    def decline(self, task: Task) -> str | None:
        """Declines other operators, layouts and types."""
        return decline_spatial(task, *OPS)

    def emit(self, task: Task, knobs: Any) -> Emitted:
        """One launch, or two where K is cut into parts."""
        node, conv = anchor_of(task), geometry(task)
        products = conv.phases if node.op == "conv2d_input_grad" else (None,)
        sizes = [_sizes(node.op, conv, phase) for phase in products]
        cuts = [plan(task.target.isa, m, n, k, conv.groups) for m, n, k in sizes]
        scratch = [cut.workspaces(conv.groups, m, n) for cut, (m, n, _) in
                   zip(cuts, sizes, strict=True)]  # fmt: skip
        workspaces = max(scratch)  # phases run one after the other and share it

        def body(ctx: Context) -> None:
            partial = ctx.workspaces[0] if workspaces else None
            for phase, cut in zip(products, cuts, strict=True):
                if phase is None:
                    emit_product(PRODUCTS[node.op](ctx, conv), cut, partial)
                else:
                    emit_product(_input_grad(ctx, conv, phase), cut, partial)

        func = build(task, body, workspaces)
        return Emitted(func, workspaces, inplace_pairs(task), {}, 2 * conv.macs)


def _sizes(op: str, conv: Geometry, phase: Phase | None = None) -> tuple[int, int, int]:
    """(M, N, K) of a product; `phase` is the input gradient's."""
    taps, depth, outputs = math.prod(conv.w[:2]), conv.w[2], conv.outputs
    if phase is not None:
        rows, columns = phase
        return conv.x[0] * rows.out * columns.out, depth, rows.taps * columns.taps * outputs
    if op == "conv2d":
        return math.prod(conv.y[:3]), outputs, taps * depth
    return taps * depth, outputs, math.prod(conv.y[:3])


def _tap(conv: Geometry, index: Expr, channels: int) -> tuple[Expr, Expr, Expr]:
    """(ky, kx, channel) of an index over taps and channels."""
    tap, channel = T.bind(index // channels), T.bind(index % channels)
    return T.bind(tap // conv.w[1]), T.bind(tap % conv.w[1]), channel


def _read_x(ctx: Context, conv: Geometry, name: str, group: Expr, at: Expr, tap: Expr) -> Expr:
    """x at a tap (with its channel) of a pixel of y; 0 in the padding."""
    n, oy, ox = pixel(at, conv.y)
    ky, kx, c = _tap(conv, tap, conv.w[2])
    iy, ix = conv.source(oy, ox, ky, kx)
    value = ctx.load(name, offset(n, iy, ix, group * conv.w[2] + c, conv.x), 1)
    return choose(within(iy, ix, conv.x), value, const(0.0))


def _writer(ctx: Context, conv: Geometry, shape: tuple[int, ...]) -> Callable[..., None]:
    """Stores a value of (group, row, output channel) in a result of this shape, epilogue first."""
    result = anchor_of(ctx.task).outputs[0]

    def write(group: Expr, m: Expr, n: Expr, value: Expr) -> None:
        finish(ctx, {result: value}, Position(shape, m, group * conv.outputs + n, 1))

    return write


def _forward(ctx: Context, conv: Geometry) -> Product:
    node = anchor_of(ctx.task)
    x, w = node.inputs[:2]
    return Product(
        *_sizes(node.op, conv),
        lambda group, m, k: _read_x(ctx, conv, x, group, m, k),
        lambda group, k, n: ctx.load(w, k * conv.y[3] + group * conv.outputs + n, 1),
        _writer(ctx, conv, conv.y), conv.groups,
    )  # fmt: skip


def _input_grad(ctx: Context, conv: Geometry, phase: Phase) -> Product:
    node = anchor_of(ctx.task)
    dy, w = node.inputs[:2]
    (rows, columns), outputs, depth = phase, conv.outputs, conv.w[2]
    size = (conv.x[0], rows.out, columns.out)

    def taps(k: Expr) -> tuple[Expr, Expr, Expr]:
        tap, o = T.bind(k // outputs), T.bind(k % outputs)
        return T.bind(tap // columns.taps), T.bind(tap % columns.taps), o

    def a(group: Expr, m: Expr, k: Expr) -> Expr:
        n, py, px = pixel(m, size)
        ty, tx, o = taps(k)
        oy, ox = T.bind(rows.source(py, ty)), T.bind(columns.source(px, tx))
        value = ctx.load(dy, offset(n, oy, ox, group * outputs + o, conv.y), 1)
        return choose(within(oy, ox, conv.y), value, const(0.0))

    def b(group: Expr, k: Expr, n: Expr) -> Expr:
        ty, tx, o = taps(k)
        tap = rows.kernel(ty) * conv.w[1] + columns.kernel(tx)
        return ctx.load(w, (tap * depth + n) * conv.y[3] + group * outputs + o, 1)

    def write(group: Expr, m: Expr, n: Expr, value: Expr) -> None:
        image, py, px = pixel(m, size)
        y, x = rows.position(py), columns.position(px)
        row = T.bind((image * conv.x[1] + y) * conv.x[2] + x)
        finish(ctx, {node.outputs[0]: value}, Position(conv.x, row, group * depth + n, 1))

    return Product(*_sizes(node.op, conv, phase), a, b, write, conv.groups, b_along_n=False)


def _weight_grad(ctx: Context, conv: Geometry) -> Product:
    node = anchor_of(ctx.task)
    x, dy = node.inputs[:2]
    return Product(
        *_sizes(node.op, conv),
        lambda group, m, k: _read_x(ctx, conv, x, group, k, m),
        lambda group, k, n: ctx.load(dy, k * conv.y[3] + group * conv.outputs + n, 1),
        _writer(ctx, conv, conv.w), conv.groups, a_along_k=False,
    )  # fmt: skip


PRODUCTS = {"conv2d": _forward, "conv2d_weight_grad": _weight_grad}
