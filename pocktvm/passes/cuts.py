"""The algebra of strided slices: how a cut of one tensor becomes a cut of another.

A cut has one entry per axis: None keeps the axis whole, (begin, end, stride) keeps a progression,
`Picked` any other increasing indices, `Selected` as many as it holds, which are known at run time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pocktvm.passes.simplify_views import refinement

Range = tuple[int, int, int]
Shape = tuple[int, ...]


class Picked(tuple[int, ...]):
    """The indices kept of an axis, where they are no progression."""


class Selected(Picked):
    """Indices that the running trainer chooses; the value `source` holds them, as it holds these
    first ones. It can only be carried over as it is: no other indices follow from it here."""

    source: str

    def __new__(cls, indices: Sequence[int], source: str) -> Selected:
        entry = super().__new__(cls, indices)
        entry.source = source
        return entry

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Selected) and other.source == self.source

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self.source)


Cut = tuple[Range | Picked | None, ...]


def kept(part: Range | Picked, extent: int) -> Sequence[int]:
    """The indices an entry keeps of an axis."""
    return part if isinstance(part, Picked) else range(extent)[slice(*part)]


def picked(indices: Sequence[int], extent: int) -> Range | Picked | None:
    """The entry that keeps these increasing indices of an axis."""
    if len(indices) == extent:
        return None
    return _range(indices) or Picked(indices)


def cut_of(attrs: Mapping[str, Any], shape: Shape) -> Cut:
    """The cut a strided_slice of a tensor of this shape makes."""
    strides = attrs.get("strides") or (1,) * len(shape)
    cut: list[Range | Picked | None] = []
    for b, e, s, n in zip(attrs["begin"], attrs["end"], strides, shape, strict=True):
        inside = range(n)[slice(b, e, s)]
        whole = len(inside) == n and inside.step == 1
        cut.append(None if whole else _range(inside))
    return tuple(cut)


def _range(indices: Sequence[int]) -> Range | None:
    """(begin, end, stride) of an increasing progression; None when it is not one."""
    if not len(indices):
        return None
    first, last = int(indices[0]), int(indices[-1])
    if len(indices) == 1:
        return first, first + 1, 1
    steps = set(np.diff(np.asarray(indices)).tolist())
    stride = steps.pop()
    return (first, last + 1, int(stride)) if not steps and stride > 0 else None


def cut_shape(cut: Cut, shape: Shape) -> Shape:
    """The shape that remains of `shape` behind a cut."""
    return tuple(n if c is None else len(kept(c, n)) for c, n in zip(cut, shape, strict=True))


def cut_attrs(cut: Cut, shape: Shape) -> dict[str, tuple[int, ...]]:
    """The attributes of strided_slice; axes with picked indices are left whole."""
    pairs = zip(cut, shape, strict=True)
    full = [(0, n, 1) if c is None or isinstance(c, Picked) else c for c, n in pairs]
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
    back: list[Range | Picked | None] = [None] * len(axes)
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
    whole: dict[int, Selected] = {}
    for axis, parts in enumerate(old):
        if (entry := cut[axis]) is None:
            continue
        if isinstance(entry, Selected):
            if parts not in new:
                return None
            whole[new.index(parts)] = entry
            continue
        split = _split(entry, [dims[p] for p in parts])
        if split is None:
            return None
        fine.update(zip(parts, split, strict=True))
    result: list[Range | Picked | None] = []
    free = any(isinstance(c, Picked) for c in cut)
    for axis, parts in enumerate(new):
        if axis in whole:
            result.append(whole[axis])
            continue
        sets = [fine.get(p, list(range(dims[p]))) for p in parts]
        if all(len(s) == dims[p] for s, p in zip(sets, parts, strict=True)):
            result.append(None)
            continue
        grid = np.arange(after[axis]).reshape([dims[p] for p in parts])
        indices = grid[np.ix_(*sets)].ravel().tolist()
        found = _range(indices)
        if found is None and not free:
            return None
        result.append(found or Picked(indices))
    return tuple(result)


def _split(entry: Range | Picked, dims: Sequence[int]) -> list[list[int]] | None:
    """The indices kept of each factor of an axis, when the kept ones are their product."""
    grid = np.zeros(int(np.prod(dims)), bool)
    grid[list(kept(entry, grid.size))] = True
    grid = grid.reshape(dims)
    sets = [
        np.flatnonzero(grid.any(axis=tuple(j for j in range(len(dims)) if j != i))).tolist()
        for i in range(len(dims))
    ]
    return sets if int(grid.sum()) == int(np.prod([len(s) for s in sets])) else None
