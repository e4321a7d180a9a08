"""Square patches of NHWC images, zeros where they reach over the edge: what Winograd transforms.

A patch that lies inside is read where it is; one that does not is first copied to the stack, one
channel vector at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pocktvm.schedule import emit
from pocktvm.schedule.depthwise import each_block
from pocktvm.schedule.emit import Context, const
from pocktvm.tvm_api import T, tirx

Expr = Any
Read = Callable[[int, int], Expr]  # (row, column) of the patch -> a channel vector


@dataclass(frozen=True)
class Patches:
    """Patch (ty, tx) of an image begins at (ty * step - top, tx * step - left); there are `across`
    of them along rows and columns, numbered image by image."""

    name: str
    shape: tuple[int, ...]
    edge: int
    step: int
    across: tuple[int, int]
    top: int = 0
    left: int = 0

    def place(self, number: Expr) -> tuple[Expr, Expr, Expr]:
        """(image, patch row, patch column) of a patch."""
        down, across = self.across
        n = T.bind(number // (down * across))
        return n, T.bind(number // across % down), T.bind(number % across)

    def visit(self, ctx: Context, number: Expr, body: Callable[[Expr, int, Read], None]) -> None:
        """Emit body(first channel, lanes, read) for every channel vector of a patch."""
        _, h, w, c = self.shape
        n, ty, tx = self.place(number)
        y, x = T.bind(ty * self.step - self.top), T.bind(tx * self.step - self.left)
        corner = T.bind(((n * h + y) * w + x) * c)

        def inside(at: Expr, lanes: int) -> None:
            def read(a: int, b: int) -> Expr:
                return ctx.load(self.name, corner + ((a * w + b) * c + at), lanes)

            body(at, lanes, read)

        def border(at: Expr, lanes: int) -> None:
            copy = self._copy(ctx, y, x, corner + at, lanes)
            body(at, lanes, lambda a, b: emit.load(copy, (a * self.edge + b) * lanes, lanes))

        rows = tirx.And(y >= 0, y + self.edge <= h)
        with T.If(tirx.And(rows, tirx.And(x >= 0, x + self.edge <= w))):
            with T.Then():
                each_vector(ctx, c, inside)
            with T.Else():
                each_vector(ctx, c, border)

    def _copy(self, ctx: Context, y: Expr, x: Expr, corner: Expr, lanes: int) -> Any:
        """A patch with zeros around the image, on the stack."""
        _, h, w, c = self.shape
        copy = emit.local(self.edge**2 * lanes)
        with T.serial(0, self.edge) as a, T.serial(0, self.edge) as b:
            rows = tirx.And(y + a >= 0, y + a < h)
            with T.If(tirx.And(rows, tirx.And(x + b >= 0, x + b < w))):
                with T.Then():
                    value = ctx.load(self.name, corner + (a * w + b) * c, lanes)
                    emit.store(copy, (a * self.edge + b) * lanes, value, lanes)
                with T.Else():
                    emit.store(copy, (a * self.edge + b) * lanes, const(0.0, lanes), lanes)
        return copy


def each_vector(ctx: Context, channels: int, body: Callable[[Expr, int], None]) -> None:
    """A loop over channel vectors."""

    def pieces(c: Expr, vectors: Sequence[tuple[int, int]]) -> None:
        for start, lanes in vectors:
            body(c + start, lanes)

    each_block(channels, ctx.lanes, 1, pieces)
