"""Offsets for blocks with known lifetimes: dynamic storage allocation, best of several heuristics.

Each heuristic is an order; blocks are placed one after the other at an offset free of everything
live at the same time. Training has long-lived activations below short-lived gradients, so no order
wins on every model: all are tried, then the best is improved by moving forward what sticks out on
top (squeaky wheel: Joslin & Clements 1999). The work is bounded by counts, not by the clock, so
that the same model always gets the same plan.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np

from pocktvm.memory.lifetimes import Block

PLACEMENTS = 60_000  # placements of one block over the whole search, about 1.5 s
CLOSE_ENOUGH = 1.001  # of the bound: what is left is not worth a second of every build


def pack(blocks: Sequence[Block]) -> tuple[list[int], int]:
    """An offset for every block, and the height: the largest end."""
    if not blocks:
        return [], 0
    problem = _Problem(blocks)
    best, height = problem.best_of_heuristics()
    return problem.improve(best, height)


def live_bytes(blocks: Sequence[Block], calls: int) -> np.ndarray:
    """Bytes live at each call; index 0 is the moment before the first call."""
    change = np.zeros(calls + 3, np.int64)
    for block in blocks:
        change[block.start + 1] += block.nbytes
        change[block.end + 2] -= block.nbytes
    return np.cumsum(change)[: calls + 2]


class _Problem:
    """Sizes, lifetimes, and who must not overlap whom."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.sizes = np.array([b.nbytes for b in blocks], np.int64)
        self.starts = np.array([b.start for b in blocks])
        self.ends = np.array([b.end for b in blocks])
        meets = (self.starts[:, None] <= self.ends) & (self.starts <= self.ends[:, None])
        np.fill_diagonal(meets, False)
        self.neighbours = [np.flatnonzero(row) for row in meets]
        load = live_bytes(blocks, int(self.ends.max()) + 1)
        self.bound = int(load.max())
        self.pressure = [int(load[b.start + 1 : b.end + 2].max()) for b in blocks]
        self.budget = PLACEMENTS

    def best_of_heuristics(self) -> tuple[list[int], int]:
        """The order and height of the best simple heuristic."""
        tries: list[tuple[int, int, list[int]]] = []
        for key in self._keys():
            order = sorted(range(len(self.sizes)), key=key)
            tries.append((int(self._height(self.place(order))), len(tries), order))
            if tries[-1][0] == self.bound:
                break
        height, _, order = min(tries)
        return order, height

    def _keys(self) -> list[Callable[[int], tuple[int, ...]]]:
        size = [int(s) for s in self.sizes]
        length = [int(n) for n in self.ends - self.starts + 1]
        start = [int(s) for s in self.starts]
        return [
            lambda i: (-size[i], start[i]),
            lambda i: (-length[i], -size[i], start[i]),
            lambda i: (-size[i] * length[i], start[i]),
            lambda i: (-self.pressure[i], -size[i], start[i]),
            lambda i: (-self.pressure[i], -length[i], start[i]),
            lambda i: (start[i], -length[i]),
            lambda i: (-start[i] - length[i], -size[i]),
        ]

    def place(self, order: Sequence[int]) -> np.ndarray:
        """Put each block of `order` into the lowest gap that holds it."""
        offsets = np.full(len(self.sizes), -1, np.int64)
        for i in order:
            near = self.neighbours[i]
            near = near[offsets[near] >= 0]
            offsets[i] = lowest_gap(offsets[near], self.sizes[near], self.sizes[i])
        self.budget -= len(order)
        return offsets

    def _height(self, offsets: np.ndarray) -> int:
        return int((offsets + self.sizes).max())

    def improve(self, order: list[int], height: int) -> tuple[list[int], int]:
        """Move forward, again and again, the blocks that end above the bound."""
        rng = random.Random(0)
        offsets = self.place(order)
        best = offsets
        current = list(order)
        stale = 0
        while height > CLOSE_ENOUGH * self.bound and self.budget > 0:
            over = np.flatnonzero(offsets + self.sizes > self.bound)
            current = self._forward(current, set(over.tolist()), rng)
            offsets = self.place(current)
            found = self._height(offsets)
            stale += 1
            if found < height:
                height, best, order, stale = found, offsets, list(current), 0
            elif stale == 12:
                current, offsets, stale = list(order), best, 0
        return [int(o) for o in best], height

    def _forward(self, order: list[int], blamed: set[int], rng: random.Random) -> list[int]:
        reach = max(1, len(order) // 2)
        position = {block: float(at) for at, block in enumerate(order)}
        for block in blamed:
            position[block] -= rng.uniform(1, reach)
        return sorted(order, key=lambda block: position[block])


def lowest_gap(starts: np.ndarray, sizes: np.ndarray, size: int) -> int:
    """The lowest offset at which `size` bytes meet none of the occupied [start, start + size)."""
    if not len(starts):
        return 0
    by_start = np.argsort(starts, kind="stable")
    starts = starts[by_start]
    tops = np.maximum.accumulate(starts + sizes[by_start])
    if starts[0] >= size:
        return 0
    fits = np.flatnonzero(starts[1:] - tops[:-1] >= size)
    return int(tops[fits[0]] if len(fits) else tops[-1])
