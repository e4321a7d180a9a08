"""What a share of a weight gains, from noisy trials of several shares of many weights.

All weights follow one curve over the shares, each at its own height: the height of a weight is
fitted to everything that was measured of it, so that the noise of a single trial counts for less.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


def smoothed(
    gains: Mapping[tuple[str, float], float], shares: Sequence[float]
) -> dict[tuple[str, float], float]:
    """(name, share) -> gain for every name and all `shares`, those never measured included.

    A trial that diverged counts as one that gained nothing.
    """
    measured = {key: gain if gain > -1e8 else 0.0 for key, gain in gains.items()}
    curve = _curve(measured, shares)
    found = {}
    for name in dict.fromkeys(name for name, _ in gains):
        mine = [(curve[s], g) for (n, s), g in measured.items() if n == name and s in curve]
        total = sum(c * c for c, _ in mine)
        height = sum(c * g for c, g in mine) / total if total else 0.0
        found.update({(name, share): height * curve[share] for share in shares})
    return found


def _curve(gains: Mapping[tuple[str, float], float], shares: Sequence[float]) -> dict[float, float]:
    """Share -> gain relative to the whole: a power of it, the one that fits the means best.

    The power is between 0.1 (an eighth gains nearly as much as all) and 1 (gain by size).
    """
    means = {s: float(np.mean([g for (_, t), g in gains.items() if t == s])) for _, s in gains}
    positive = {s: m for s, m in means.items() if m > 0}
    power = 0.5
    if len(positive) > 1:
        x, y = np.log(list(positive)), np.log(list(positive.values()))
        power = float(np.clip(np.polyfit(x, y, 1)[0], 0.1, 1.0))
    return {share: share**power for share in shares}
