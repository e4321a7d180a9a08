"""A part of a tensor that learns: which axis, which indices along it.

A scheme's value names it: a share of the input channels (`0.25`), of the output channels
(`"out:0.25"`), or the channels themselves (`[0, 3, 5]`, `"out:[0, 3, 5]"`). Of a share the channels
with the largest weights are taken, or with `"activation:0.25"` those that carry most on the
caller's data. A depthwise convolution has one side: its channels are both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pocktvm.errors import PockError
from pocktvm.ir.model import Axes, Model, Parameter

SIDES = ("in", "out")
RANKINGS = ("magnitude", "activation")


class Part(float):
    """The share of a tensor that learns, with its `indices` (increasing) along `axis`.

    A plain 1.0 stands for the whole tensor wherever a share is told. Of a `selectable` part the
    indices are those of the first step; the running trainer may choose as many others.
    """

    axis: int
    indices: tuple[int, ...]
    extent: int
    selectable: bool

    def __new__(
        cls, axis: int, indices: tuple[int, ...], extent: int, selectable: bool = False
    ) -> Part:
        part = super().__new__(cls, len(indices) / extent)
        part.axis, part.indices, part.extent = axis, indices, extent
        part.selectable = selectable
        return part


@dataclass(frozen=True)
class Wanted:
    """What a scheme's value asks of a tensor: a share by some ranking, or the indices."""

    side: str  # in | out
    share: float = 0.0
    ranking: str = "magnitude"
    indices: tuple[int, ...] = ()


def parse_value(pattern: Any, value: Any) -> Any:
    """A scheme's value in its normal form: 1, 0, a share, a text, or a tuple of indices.

    Raises PockError for anything else.
    """
    if not isinstance(pattern, str):
        raise PockError(f"scheme: {pattern!r} is no pattern over parameter names.")
    if isinstance(value, bool | int | float) and 0 <= value <= 1:
        return int(value) if value in (0, 1) else float(value)
    wanted = _wanted(value)
    if wanted is None:
        raise PockError(
            f"scheme: '{pattern}' = {value!r}: expected 1, 0, a share such as 0.25, "
            '"out:0.25", or a list of channel indices.'
        )
    if not wanted.indices and wanted.share in (0, 1):
        return int(wanted.share)
    if isinstance(value, list | tuple):
        return tuple(value)
    if wanted == Wanted("in", wanted.share):
        return wanted.share
    return value.replace(" ", "").removeprefix("in:")


def _wanted(value: Any) -> Wanted | None:
    if isinstance(value, float | int) and not isinstance(value, bool):
        return Wanted("in", float(value)) if 0 <= value <= 1 else None
    if isinstance(value, list | tuple):
        return _indices("in", value)
    if not isinstance(value, str):
        return None
    *words, last = value.replace(" ", "").split(":", 2 if "[" not in value else 1)
    side = words.pop(0) if words and words[0] in SIDES else "in"
    if last.startswith("["):
        try:
            return None if words else _indices(side, json.loads(last))
        except ValueError:
            return None
    ranking = words.pop(0) if words and words[0] in RANKINGS else "magnitude"
    try:
        share = float(last)
    except ValueError:
        return None
    return None if words or not 0 <= share <= 1 else Wanted(side, share, ranking)


def _indices(side: str, value: Any) -> Wanted | None:
    ok = isinstance(value, list | tuple) and value and all(type(i) is int and i >= 0 for i in value)
    if not ok or len(set(value)) != len(value):
        return None
    return Wanted(side, indices=tuple(sorted(value)))


def ranks_by_activation(value: Any) -> bool:
    """True for a value whose channels are chosen on the caller's data."""
    wanted = None if isinstance(value, bool) else _wanted(value)
    return wanted is not None and wanted.ranking == "activation"


def choose(
    parameter: Parameter, axes: Axes, value: Any, activity: Mapping[str, np.ndarray] | None = None
) -> float:
    """The part of `parameter` that a normal value names; 1.0 where that is all of it.

    `activity`: by side ("in", "out"), one number for each channel, how much it carries on the
    caller's data.
    Raises PockError for an index the tensor does not have, and without the activity a ranking
    needs.
    """
    wanted, shape = _wanted(value), parameter.value.shape
    assert wanted is not None, value
    if not shape:
        return 1.0
    axis, unit, groups = side_of(shape, axes, wanted.side)
    extent = shape[axis]
    count = extent // unit
    if wanted.indices:
        if wanted.indices[-1] >= count:
            raise PockError(
                f"scheme: '{parameter.name}' has {count} {_WORDS[wanted.side]} channels, "
                f"numbered from 0; there is no {wanted.indices[-1]}."
            )
        chosen = np.asarray(wanted.indices)
    else:
        scores = _scores(parameter, axis, unit, wanted, activity)
        chosen = _largest(scores.reshape(groups, -1), wanted.share)
    rows = (chosen[:, None] * unit + np.arange(unit)).ravel()
    if len(rows) == extent:
        return 1.0
    return Part(axis, tuple(int(i) for i in rows), extent)


def selectable(model: Model, updated: Mapping[str, float]) -> dict[str, float]:
    """`updated` with every part selectable whose channels any others can stand in for: all but
    those of grouped convolutions, where a channel has rows in several groups.

    Raises PockError where that leaves nothing to choose.
    """
    chosen = dict(updated)
    for name, part in updated.items():
        if isinstance(part, Part) and _is_plain(model.channels.get(name, Axes()), model, name):
            chosen[name] = Part(part.axis, part.indices, part.extent, True)
    if not any(isinstance(p, Part) and p.selectable for p in chosen.values()):
        raise PockError(
            "nothing to re-sample: the scheme trains no tensor in part, or only parts of grouped "
            "convolutions.\n  Give a weight a share below 1, such as "
            "'{\"blocks.3.pw1.0.weight\": 0.25}'."
        )
    return chosen


def _is_plain(axes: Axes, model: Model, name: str) -> bool:
    shape = model.parameters[name].value.shape
    depthwise = axes.groups > 1 and shape[axes.inputs] == 1 and not _multiplied(shape, axes)
    return len(shape) == 1 or axes.groups == 1 or depthwise


_WORDS = {"in": "input", "out": "output"}


def side_of(shape: tuple[int, ...], axes: Axes, side: str) -> tuple[int, int, int]:
    """Where a side's channels lie: axis, rows a channel has there, and the number of groups that
    must give equally many."""
    if len(shape) == 1:
        return 0, 1, 1
    if axes.groups > 1 and shape[axes.inputs] == 1:  # depthwise: both sides are the groups
        unit = shape[axes.outputs] // axes.groups if side == "in" else 1
        return axes.outputs, unit, axes.groups if side == "out" and _multiplied(shape, axes) else 1
    if side == "out":
        return axes.outputs, 1, axes.groups
    return axes.inputs, 1, 1


def _multiplied(shape: tuple[int, ...], axes: Axes) -> bool:
    return shape[axes.outputs] != axes.groups


def _scores(
    parameter: Parameter,
    axis: int,
    unit: int,
    wanted: Wanted,
    activity: Mapping[str, np.ndarray] | None,
) -> np.ndarray:
    """One number a channel; the larger, the sooner it is chosen."""
    if wanted.ranking == "activation":
        if activity is None:
            raise PockError(
                f"scheme: '{parameter.name}' chooses its channels by activation, and there is no "
                "data to see them on.\n  Give the build samples (--data F), or rank by magnitude."
            )
        count = parameter.value.shape[axis] // unit
        carried = activity[wanted.side]
        if len(carried) % count:
            raise PockError(
                f"scheme: the {len(carried)} channels around '{parameter.name}' are not its "
                f"{count}; rank it by magnitude."
            )
        return carried.reshape(-1, count).sum(axis=0)
    others = tuple(i for i in range(parameter.value.ndim) if i != axis)
    squares = np.square(parameter.value.astype(np.float64)).sum(axis=others)
    return squares.reshape(-1, unit).sum(axis=1)


def _largest(scores: np.ndarray, share: float) -> np.ndarray:
    """Indices, increasing, of the largest of every row of scores; at least one of each."""
    count = max(1, round(share * scores.shape[1]))
    order = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    return np.sort((order + np.arange(len(scores))[:, None] * scores.shape[1]).ravel())
