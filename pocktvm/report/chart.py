"""A stacked area chart as SVG text: no library, the same bytes for the same data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from pocktvm.units import format_bytes

WIDTH, HEIGHT, LEFT, BOTTOM = 960, 320, 70, 24


def stacked_area(
    series: Mapping[str, Sequence[float]],
    colours: Mapping[str, str],
    labels: Sequence[str],
    *,
    marker: int | None = None,
) -> str:
    """Bytes over calls, one layer a series from the bottom up; `marker` is a call to point at.

    Every call is a column with its label and sum as a tooltip.
    """
    count = len(labels)
    totals = [sum(values[i] for values in series.values()) for i in range(count)]
    top = max(totals, default=0) or 1
    plot = _Scale(count, top)
    floor = [0.0] * count
    layers = []
    for name, values in series.items():
        roof = [f + v for f, v in zip(floor, values, strict=True)]
        layers.append(f'<path d="{plot.band(floor, roof)}" fill="{colours[name]}"/>')
        floor = roof
    tips = [
        f'<rect x="{plot.x(i):.1f}" y="0" width="{plot.step:.2f}" height="{HEIGHT}" '
        f'fill="transparent"><title>{escape(label)}: {format_bytes(int(total))}</title></rect>'
        for i, (label, total) in enumerate(zip(labels, totals, strict=True))
    ]
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT + BOTTOM}" role="img" '
        f'aria-label="live bytes over calls">{_axis(plot, top, count)}{"".join(layers)}'
        f"{_marked(plot, marker, labels)}{''.join(tips)}</svg>"
    )


class _Scale:
    """Calls to pixels from the left, bytes to pixels from the top."""

    def __init__(self, count: int, top: float) -> None:
        self.step = (WIDTH - LEFT) / max(1, count)
        self.top = top

    def x(self, call: float) -> float:
        return LEFT + call * self.step

    def y(self, nbytes: float) -> float:
        return HEIGHT - nbytes / self.top * (HEIGHT - 12)

    def band(self, floor: Sequence[float], roof: Sequence[float]) -> str:
        """The outline of one layer, a flat step for every call."""
        there = [(self.x(i + side), self.y(v)) for i, v in enumerate(roof) for side in (0, 1)]
        back = [(self.x(i + side), self.y(v)) for i, v in enumerate(floor) for side in (0, 1)]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in [*there, *reversed(back)])
        return f"M{points}Z"


def _axis(plot: _Scale, top: float, count: int) -> str:
    lines = []
    for part in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = plot.y(top * part)
        lines.append(
            f'<line x1="{LEFT}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">'
            f"{format_bytes(int(top * part))}</text>"
        )
    lines.append(f'<text x="{LEFT}" y="{HEIGHT + 18}">call 0</text>')
    lines.append(f'<text x="{WIDTH}" y="{HEIGHT + 18}" text-anchor="end">call {count - 1}</text>')
    return "".join(lines)


def _marked(plot: _Scale, marker: int | None, labels: Sequence[str]) -> str:
    if marker is None:
        return ""
    x = plot.x(marker + 0.5)
    anchor = "end" if x > WIDTH / 2 else "start"
    return (
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{HEIGHT}" stroke="#222" '
        f'stroke-dasharray="3 3"/><text x="{x + (-6 if anchor == "end" else 6):.1f}" '
        f'y="{HEIGHT + 18}" text-anchor="{anchor}">peak: {escape(labels[marker])}</text>'
    )
