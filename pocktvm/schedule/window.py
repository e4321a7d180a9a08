"""The geometry of sliding windows: which source element each tap of a kernel meets.

A convolution, its input gradient and a pooling are one form on each axis: output `o` reads source
elements `o * step + offset + tap * dilation`. A forward convolution is one such `Axis`. The input
gradient of a convolution with stride s is s of them ("phases"): the gradient's elements p, p + s,
p + 2s, … see only the taps that can reach them, so no zero is ever multiplied.

Borders are decided here, at build time: which outputs see every tap (`interior`), which taps a
column tile's pixels see (`tiles`), and for rows the range of valid taps, an expression (`bounds`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pocktvm.schedule.loops import ceil_div
from pocktvm.tvm_api import T, tirx

Expr = Any


@dataclass(frozen=True)
class Axis:
    """One axis of a window. Output number o stands at `first + every * o` of the real output."""

    out: int  # outputs
    src: int  # source elements
    step: int  # source elements from one output to the next
    taps: int
    offset: int  # source element of tap 0 at output 0
    dilation: int = 1  # source elements from one tap to the next, positive
    kernel0: int = 0  # the kernel's index of tap 0
    kernel_step: int = 1
    first: int = 0
    every: int = 1

    def source(self, o: Any, tap: Any) -> Any:
        """The source element tap number `tap` meets at output o."""
        return o * self.step + (self.offset + tap * self.dilation)

    def kernel(self, tap: Any) -> Any:
        """The kernel's index of tap number `tap`."""
        return self.kernel0 + tap * self.kernel_step

    def position(self, o: Any) -> Any:
        """Where output o lies in the real output."""
        return self.first + o * self.every if (self.first, self.every) != (0, 1) else o

    def valid(self, o: int, tap: int) -> bool:
        """Does the tap meet a real element?"""
        return 0 <= self.source(o, tap) < self.src

    @property
    def interior(self) -> tuple[int, int]:
        """The outputs [lo, hi) that see every tap."""
        lo = max(0, -(self.offset // self.step))
        last = self.src - 1 - self.offset - (self.taps - 1) * self.dilation
        hi = min(self.out, last // self.step + 1) if last >= 0 else 0
        return (lo, hi) if hi > lo else (0, 0)

    def bounds(self, o: Expr) -> tuple[Expr, Expr]:
        """The valid taps [lo, hi) at output o; plain numbers where they do not depend on o."""
        if self.interior == (0, self.out) or not self.taps:
            return 0, self.taps
        base = T.bind(self.source(o, 0))
        d = self.dilation - 1
        lo = tirx.Max(tirx.const(0, "int32") - base, tirx.const(0, "int32"))
        hi = tirx.Max(tirx.const(self.src, "int32") - base, tirx.const(0, "int32"))
        if d:
            lo, hi = (lo + d) // self.dilation, (hi + d) // self.dilation
        return T.bind(lo), T.bind(tirx.Min(hi, tirx.const(self.taps, "int32")))

    def outputs(self, tap: Expr) -> tuple[Expr, Expr]:
        """The outputs [lo, hi) for which the tap meets a real element; hi may be below lo."""
        shift = self.offset + tap * self.dilation
        if isinstance(shift, int):
            lo, hi = max(0, -(shift // self.step)), (self.src - shift - 1) // self.step + 1
            return lo, min(hi, self.out)
        zero = tirx.const(0, "int32")
        lo = (tirx.Max(zero - shift, zero) + (self.step - 1)) // self.step
        hi = (tirx.Max(self.src - shift, zero) + (self.step - 1)) // self.step
        return T.bind(lo), T.bind(tirx.Min(hi, tirx.const(self.out, "int32")))

    def covering(self, element: Expr) -> tuple[Expr, Expr]:
        """The outputs [lo, hi) whose window spans a source element (forward axes; with dilation
        some of them step over it)."""
        before = element - self.offset
        far = tirx.Max(before - (self.taps - 1) * self.dilation, tirx.const(0, "int32"))
        lo = (far + (self.step - 1)) // self.step
        hi = tirx.Min(before // self.step + 1, tirx.const(self.out, "int32"))
        return T.bind(lo), T.bind(hi)

    def cases(self) -> list[tuple[int, int, tuple[int, ...]]]:
        """Ranges of outputs [start, stop) with the taps that all of them see."""
        found: list[tuple[int, int, tuple[int, ...]]] = []
        for o in range(self.out):
            taps = tuple(t for t in range(self.taps) if self.valid(o, t))
            if found and found[-1][2] == taps:
                found[-1] = (found[-1][0], o + 1, taps)
            else:
                found.append((o, o + 1, taps))
        return found


@dataclass(frozen=True)
class Run:
    """`count` tiles of `width` outputs side by side that see the same taps.

    `pixels[tap]` lists the outputs of a tile for which the tap is valid."""

    start: int
    width: int
    count: int
    pixels: tuple[tuple[int, ...], ...]

    @property
    def whole(self) -> bool:
        """Every pixel sees every tap."""
        return all(len(p) == self.width for p in self.pixels)

    @property
    def inside(self) -> frozenset[int]:
        """The pixels that see every tap."""
        return frozenset(r for r in range(self.width) if all(r in p for p in self.pixels))


def tiles(axis: Axis, widest: int, inside: bool = False) -> list[Run]:
    """Cover the outputs of an axis with tiles of at most `widest`, as even as can be; `inside`:
    only those that see every tap."""
    lo, hi = axis.interior if inside else (0, axis.out)
    width = max(1, ceil_div(hi - lo, max(1, ceil_div(hi - lo, widest))))
    runs: list[Run] = []
    for start in range(lo, hi, width):
        w = min(width, hi - start)
        pixels = tuple(
            tuple(r for r in range(w) if axis.valid(start + r, tap)) for tap in range(axis.taps)
        )
        last = runs[-1] if runs else None
        if last and (last.width, last.pixels) == (w, pixels):
            runs[-1] = Run(last.start, w, last.count + 1, pixels)
        else:
            runs.append(Run(start, w, 1, pixels))
    return runs


def gradient_axes(
    out: int, src: int, kernel: int, stride: int, dilation: int, before: int
) -> list[Axis]:
    """The phases of an input gradient along one axis: `out` elements of dx from `src` of dy."""
    axes = []
    for phase in range(min(stride, out)):
        reach = [k for k in range(kernel) if (phase + before - k * dilation) % stride == 0][::-1]
        apart = reach[0] - reach[1] if len(reach) > 1 else 0
        axes.append(
            Axis(
                out=ceil_div(out - phase, stride),
                src=src,
                step=1,
                taps=len(reach),
                offset=(phase + before - reach[0] * dilation) // stride if reach else 0,
                dilation=apart * dilation // stride if apart else 1,
                kernel0=reach[0] if reach else 0,
                kernel_step=-apart,
                first=phase,
                every=stride,
            )
        )
    return axes


@dataclass(frozen=True)
class Window:
    """A spatial operator's attributes, read once."""

    strides: tuple[int, int]
    padding: tuple[int, int, int, int]  # top, left, bottom, right
    dilation: tuple[int, int]
    groups: int = 1

    @classmethod
    def of(cls, attrs: Mapping[str, Any]) -> Window:
        """From a node's attributes (ir/ops.py)."""
        return cls(
            _pair(attrs.get("strides", (1, 1))),
            tuple(int(p) for p in attrs.get("padding", (0, 0, 0, 0))),  # type: ignore[arg-type]
            _pair(attrs.get("dilation", (1, 1))),
            int(attrs.get("groups", 1)),
        )

    def forward(self, out: Sequence[int], src: Sequence[int], kernel: Sequence[int]) -> list[Axis]:
        """Rows and columns of a forward operator; out, src, kernel are (height, width)."""
        return [
            Axis(out[i], src[i], self.strides[i], kernel[i], -self.padding[i], self.dilation[i])
            for i in range(2)
        ]

    def gradient(
        self, out: Sequence[int], src: Sequence[int], kernel: Sequence[int]
    ) -> tuple[list[Axis], list[Axis]]:
        """Row phases and column phases of the input gradient; `out` is dx, `src` is dy."""
        rows, columns = (
            gradient_axes(
                out[i], src[i], kernel[i], self.strides[i], self.dilation[i], self.padding[i]
            )
            for i in range(2)
        )
        return rows, columns


def _pair(value: Any) -> tuple[int, int]:
    a, b = value
    return int(a), int(b)
