"""The shape of the walk that computes both gradients of a depthwise convolution: which taps reach
which pixels, tiles of columns, bands of rows (schedule/depthwise_grads.py emits it)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from pocktvm.ir.target import Isa
from pocktvm.schedule.loops import balanced, ceil_div, hands
from pocktvm.schedule.window import Axis

Reach = tuple[tuple[int, int], ...]  # of one pixel: (kernel column, column of dy from the tile's)


@dataclass(frozen=True)
class Run:
    """`count` tiles of `width` pixels side by side from `start` on, that see the same taps."""

    start: int
    width: int
    count: int
    pixels: tuple[Reach, ...]


@dataclass(frozen=True)
class Grads:
    """One convolution's gradients: names, NHWC shapes, phases of rows and of columns of dx.

    `weight` and `dx` belong to the input gradient, `dw` to the weight gradient; `dy_sum` and
    `z_sum` are values that sum dy and `z`, the result of the input gradient's epilogue, over
    pixels ("" where nobody asks)."""

    dy: str
    weight: str
    dx: str
    x: str
    dw: str
    z: str
    dy_sum: str
    z_sum: str
    dx_shape: tuple[int, ...]
    dy_shape: tuple[int, ...]
    kernel: tuple[int, int]
    rows: tuple[Axis, ...]
    columns: tuple[Axis, ...]

    @property
    def taps(self) -> int:
        """Sums of the weight gradient a channel."""
        return self.kernel[0] * self.kernel[1]

    @property
    def slots(self) -> int:
        """Sums that every channel has: its taps', and those of dy and z where asked for."""
        return self.taps + bool(self.dy_sum) + bool(self.z_sum)

    @property
    def macs(self) -> int:
        """Multiply-adds of both gradients, borders counted whole."""
        n, _, _, c = self.dy_shape
        one = sum(n * c * r.out * s.out * r.taps * s.taps for r in self.rows for s in self.columns)
        return 2 * one

    @cached_property
    def once(self) -> tuple[int, int] | None:
        """A tap (kernel row, kernel column) that meets every pixel of dy exactly once, if any."""
        row, column = _covering(self.rows), _covering(self.columns)
        return None if row is None or column is None else (row, column)


def _covering(phases: Sequence[Axis]) -> int | None:
    for axis in phases:
        for tap in range(axis.taps):
            met = sum(axis.valid(o, tap) for o in range(axis.out))
            if met == axis.src:
                return int(axis.kernel(tap))
    return None


def column_runs(phases: Sequence[Axis], widest: int) -> list[Run]:
    """Cover the columns of dx with tiles of whole strides."""
    stride, extent = len(phases), sum(axis.out for axis in phases)
    width = balanced(ceil_div(extent, stride), max(1, widest // stride)) * stride
    runs: list[Run] = []
    for start in range(0, extent, width):
        pixels = tuple(_reach(phases, p, start // stride)
                       for p in range(start, min(start + width, extent)))  # fmt: skip
        last = runs[-1] if runs else None
        if last and last.pixels == pixels:
            runs[-1] = Run(last.start, last.width, last.count + 1, pixels)
        else:
            runs.append(Run(start, len(pixels), 1, pixels))
    return runs


def _reach(phases: Sequence[Axis], pixel: int, base: int) -> Reach:
    """The taps that reach a column of dx; columns of dy counted from `base`."""
    axis, o = phases[pixel % len(phases)], pixel // len(phases)
    return tuple(
        (int(axis.kernel(t)), int(axis.source(o, t)) - base)
        for t in range(axis.taps)
        if axis.valid(o, t)
    )


@dataclass(frozen=True)
class Plan:
    """`pixels` of dx x `vectors` channel vectors a tile; bands of rows, one a task."""

    grads: Grads
    pixels: int
    vectors: int
    isa: Isa

    @cached_property
    def lines(self) -> int:
        """Row numbers: images times rows of the phase that has most."""
        return self.grads.dx_shape[0] * max(axis.out for axis in self.grads.rows)

    @cached_property
    def bands(self) -> int:
        """Bands of rows: one task each, one a core where threads are worth it."""
        return hands(self.isa, 2 * self.grads.macs, self.lines)

    @property
    def band(self) -> int:
        """Row numbers of a task."""
        return ceil_div(self.lines, self.bands)

    @property
    def sums(self) -> int:
        """Elements of one task's sums."""
        return max(1, self.grads.slots * self.grads.dx_shape[3])

    @property
    def workspaces(self) -> tuple[tuple[int, str], ...]:
        """The sums of all bands."""
        return ((self.bands * self.sums, "float32"),)
