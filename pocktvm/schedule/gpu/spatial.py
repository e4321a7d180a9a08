"""Pooling and resizing, with their gradients: one thread an element.

What happens at an element is the CPU rules' (schedule/rules/pool.py, resize.py), one float wide:
gradients gather, so every element has one owner.
"""

from __future__ import annotations

import math
from typing import Any

from pocktvm.schedule.emit import Context, build
from pocktvm.schedule.gpu.conv import pixel
from pocktvm.schedule.gpu.launch import threads
from pocktvm.schedule.inplace import inplace_pairs
from pocktvm.schedule.rule import Emitted, Knobless, Task
from pocktvm.schedule.rules.pool import Pool as CpuPool
from pocktvm.schedule.rules.pool import PoolNest
from pocktvm.schedule.rules.resize import Resize as CpuResize
from pocktvm.schedule.rules.resize import ResizeNest
from pocktvm.tvm_api import T


class Pool(Knobless):
    """max_pool2d, avg_pool2d and their gradients."""

    name = "pool"

    def decline(self, task: Task) -> str | None:
        """Declines other operators, layouts and types."""
        return CpuPool().decline(task)

    def emit(self, task: Task, knobs: Any) -> Emitted:
        """Neighbouring threads take neighbouring channels."""
        return _elements(task, PoolNest(task, 1))


class Resize(Knobless):
    """resize2d and resize2d_grad."""

    name = "resize"

    def decline(self, task: Task) -> str | None:
        """Declines other operators, layouts, types and methods (cubic)."""
        return CpuResize().decline(task)

    def emit(self, task: Task, knobs: Any) -> Emitted:
        """Neighbouring threads take neighbouring channels."""
        return _elements(task, ResizeNest(task))


def _elements(task: Task, nest: PoolNest | ResizeNest) -> Emitted:
    shape = nest.out

    def body(ctx: Context) -> None:
        for flat in threads(math.prod(shape)):
            n, y, x = pixel(T.bind(flat // shape[3]), shape)
            nest.element(ctx, n, y, x, T.bind(flat % shape[3]))

    return Emitted(build(task, body), inplace=inplace_pairs(task))
