"""The algebra of strided slices: how a cut of one tensor becomes a cut of another.

A cut has one entry per axis: None keeps the axis whole, (begin, end, stride) keeps a progression.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pocktvm.passes.simplify_views import refinement

Range = tuple[int, int, int]
Cut = tuple[Range | None, ...]
Shape = tuple[int, ...]


def cut_of(attrs: Mapping[str, Any], shape: Shape) -> Cut:
    """The cut a strided_slice of a tensor of this shape makes."""
    strides = attrs.get("strides") or (1,) * len(shape)
    cut: list[Range | None] = []
    for b, e, s, n in zip(attrs["begin"], attrs["end"], strides, shape, strict=True):
        kept = range(n)[slice(b, e, s)]
        whole = len(kept) == n and kept.step == 1
        cut.append(None if whole else _range(kept))
    return tuple(cut)


def _range(kept: Sequence[int]) -> Range | None:
    """(begin, end, stride) of an increasing progression; None when it is not one."""
    if not len(kept):
        return None
    if len(kept) == 1:
        return int(kept[0]), int(kept[0]) + 1, 1
    steps = set(np.diff(np.asarray(kept)).tolist())
    stride = steps.pop()
    return (int(kept[0]), int(kept[-1]) + 1, int(stride)) if not steps and stride > 0 else None


def cut_shape(cut: Cut, shape: Shape) -> Shape:
    """The shape that remains."""
    return tuple(n if c is None else len(range(*c)) for c, n in zip(cut, shape, strict=True))


def cut_attrs(cut: Cut, shape: Shape) -> dict[str, tuple[int, ...]]:
    """The attributes of strided_slice."""
    full = [(0, n, 1) if c is None else c for c, n in zip(cut, shape, strict=True)]
    begin, end, strides = zip(*full, strict=True)
    return {"begin": begin, "end": end, "strides": strides}


def is_whole(cut: Cut) -> bool:
    """True when nothing is cut away."""
    return all(c is None for c in cut)


def broadcast_cut(cut: Cut, operand: Shape) -> Cut:
    """The same cut of an operand that broadcasts to the cut tensor."""
    mine = cut[len(cut) - len(operand) :]
    return tuple(None if n == 1 else c for c, n in zip(mine, operand, strict=True))


def permuted_cut(cut: Cut, axes: Sequence[int]) -> Cut:
    """The cut of permute_dims(x, axes) from x's."""
    return tuple(cut[a] for a in axes)


def unpermuted_cut(cut: Cut, axes: Sequence[int]) -> Cut:
    """The cut of x from that of permute_dims(x, axes)."""
    back: list[Range | None] = [None] * len(axes)
    for i, a in enumerate(axes):
        back[a] = cut[i]
    return tuple(back)


def reshaped_cut(cut: Cut, before: Shape, after: Shape) -> Cut | None:
    """The cut of reshape(x, after) from x's; None where the kept elements are no cut there."""
    pieces = refinement(before, after)
    if pieces is None:
        return None
    dims, old, new = pieces
    fine: dict[int, list[int]] = {}
    for axis, parts in enumerate(old):
        if (kept := cut[axis]) is None:
            continue
        split = _split(kept, [dims[p] for p in parts])
        if split is None:
            return None
        fine.update(zip(parts, split, strict=True))
    result: list[Range | None] = []
    for axis, parts in enumerate(new):
        sets = [fine.get(p, list(range(dims[p]))) for p in parts]
        if all(len(s) == dims[p] for s, p in zip(sets, parts, strict=True)):
            result.append(None)
            continue
        grid = np.arange(after[axis]).reshape([dims[p] for p in parts])
        found = _range(grid[np.ix_(*sets)].ravel().tolist())
        if found is None:
            return None
        result.append(found)
    return tuple(result)


def _split(kept: Range, dims: Sequence[int]) -> list[list[int]] | None:
    """The indices kept of each factor of an axis, when the kept ones are their product."""
    grid = np.zeros(int(np.prod(dims)), bool)
    grid[slice(*kept)] = True
    grid = grid.reshape(dims)
    sets = [
        np.flatnonzero(grid.any(axis=tuple(j for j in range(len(dims)) if j != i))).tolist()
        for i in range(len(dims))
    ]
    return sets if int(grid.sum()) == int(np.prod([len(s) for s in sets])) else None
