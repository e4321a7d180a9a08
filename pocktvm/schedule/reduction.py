"""The shape of a reduction, with axes merged: what the reduce rule loops over.

Neighbouring axes of one kind (kept or reduced) become one where no operand of the prologue
broadcasts along only one of them. Where the kept axes give too few tasks for the cores, the
outermost reduced axis is cut into a fixed number of parts, each summed by a task of its own into a
workspace: the order of additions never depends on the threads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pocktvm.ir.graph import Node
from pocktvm.schedule.rule import Task

PARTS = 8


@dataclass(frozen=True)
class Axis:
    """One loop: `source` are the input's axes it stands for. A part counts as kept."""

    extent: int
    reduced: bool
    source: tuple[int, ...]
    part: bool = False


@dataclass(frozen=True)
class Reduction:
    """A reduction taken apart.

    node      the reduction itself
    axes      its loops: neighbouring axes of the input merged, perhaps one cut into parts
    prologue  the elementwise nodes before it
    inner     the task with the prologue's types reshaped to `axes`
    outer     the task with the epilogue's types flattened where that may be
    """

    node: Node
    axes: tuple[Axis, ...]
    prologue: tuple[Node, ...]
    inner: Task
    outer: Task

    @property
    def shape(self) -> tuple[int, ...]:
        """Extents of all loops."""
        return tuple(axis.extent for axis in self.axes)

    @property
    def count(self) -> int:
        """How many elements are reduced into one."""
        return math.prod(a.extent for a in self.axes if a.reduced or a.part)

    @property
    def parts(self) -> int:
        """Partial results of every output element."""
        return math.prod(a.extent for a in self.axes if a.part)


def split_body(task: Task) -> tuple[tuple[Node, ...], Node, tuple[Node, ...]]:
    """(prologue, anchor, epilogue) of a group or a single node."""
    if not task.node.body:
        return (), task.node, ()
    at, body = task.node.attrs["anchor"], task.node.body
    return body[:at], body[at], body[at + 1 :]


def analyse(task: Task, partition: bool) -> Reduction:
    """Merge the axes of a reduction; with `partition`, cut the outermost reduced one."""
    prologue, node, epilogue = split_body(task)
    shape = task.shape(node.inputs[0])
    reduced = reduced_axes(node, len(shape))
    operands = [padded(task, n, len(shape)) for p in prologue for n in (*p.inputs, *p.outputs)]
    out = task.values[node.outputs[0]]
    flat = all(
        task.shape(n) == out.shape or task.values[n].size == 1
        for e in epilogue
        for n in (*e.inputs, *e.outputs)
    )
    axes = _merge(shape, reduced, operands, flat)
    if partition:
        axes = _cut(axes)
    names = {n for p in prologue for n in (*p.inputs, *p.outputs)} | {node.inputs[0]}
    inner = {
        n: replace(task.values[n], shape=_reshaped(padded(task, n, len(shape)), shape, axes))
        if task.values[n].size > 1
        else task.values[n]
        for n in names
    }
    outer = dict(task.values)
    if flat:
        for name in {node.outputs[0], *(n for e in epilogue for n in (*e.inputs, *e.outputs))}:
            if task.shape(name) == out.shape:
                outer[name] = replace(outer[name], shape=(out.size,))
    return Reduction(
        node,
        axes,
        prologue,
        replace(task, values={**task.values, **inner}),
        replace(task, values=outer),
    )


def reduced_axes(node: Node, rank: int) -> frozenset[int]:
    """The axes an operator reduces; all of them when it names none."""
    axes = node.attrs.get("axes")
    return frozenset(range(rank)) if axes is None else frozenset(a % rank for a in axes)


def padded(task: Task, name: str, rank: int) -> tuple[int, ...]:
    """A value's shape with leading ones up to `rank` axes."""
    shape = task.shape(name)
    return (1,) * (rank - len(shape)) + shape


def _merge(
    shape: Sequence[int], reduced: frozenset[int], operands: Sequence[Sequence[int]], flat: bool
) -> tuple[Axis, ...]:
    axes: list[Axis] = []
    for i, extent in enumerate(shape):
        if extent == 1:
            continue
        kind = i in reduced
        before = axes[-1] if axes else None
        if before and before.reduced == kind and (kind or flat):
            source = (*before.source, i)
            uniform = all(
                all(p[a] == shape[a] for a in source) or all(p[a] == 1 for a in source)
                for p in operands
            )
            if uniform:
                axes[-1] = Axis(before.extent * extent, kind, source)
                continue
        axes.append(Axis(extent, kind, (i,)))
    return tuple(axes) or (Axis(1, False, ()),)


def _cut(axes: tuple[Axis, ...]) -> tuple[Axis, ...]:
    at = next((i for i, axis in enumerate(axes) if axis.reduced), None)
    if at is None:
        return axes
    axis = axes[at]
    parts = next((p for p in (PARTS, *range(16, 1, -1)) if axis.extent % p == 0), 1)
    if parts == 1:
        return axes
    pieces = (
        Axis(parts, False, axis.source, True),
        Axis(axis.extent // parts, True, axis.source),
    )
    return (*axes[:at], *pieces, *axes[at + 1 :])


def _reshaped(
    operand: Sequence[int], shape: Sequence[int], axes: Sequence[Axis]
) -> tuple[int, ...]:
    return tuple(
        axis.extent if all(operand[a] == shape[a] for a in axis.source) else 1 for axis in axes
    )
