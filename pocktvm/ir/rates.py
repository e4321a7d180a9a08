"""Learning rates as an input of the step: one factor for every channel of every tensor.

A step compiled with them learns whatever the factors say: 0 freezes, 1 is the plain rate. So one
artifact in which everything may learn tries out every scheme, without compiling any of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pocktvm.ir.model import Axes, Input, Model
from pocktvm.ir.part import Part, side_of

RATES = "pocktvm_rates"


@dataclass(frozen=True)
class Slot:
    """Where a tensor's factors lie in the input, and the shape they are broadcast from."""

    begin: int
    axis: int | None  # None: one factor for all of the tensor
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many factors the tensor has."""
        return int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True)
class Rates:
    """The input `pocktvm_rates`, float32 [size], and each tensor's slot in it."""

    slots: Mapping[str, Slot]
    size: int

    @classmethod
    def of(cls, model: Model, updated: Mapping[str, float]) -> Rates:
        """Slots for these tensors: vectors have one factor, weights one for each channel on the
        input side."""
        slots: dict[str, Slot] = {}
        at = 0
        for name in updated:
            shape = model.parameters[name].value.shape
            axis: int | None = None
            one: tuple[int, ...] = ()
            if len(shape) > 1:
                axis = side_of(shape, model.channels.get(name, Axes()), "in")[0]
                one = tuple(n if i == axis else 1 for i, n in enumerate(shape))
            slots[name] = Slot(at, axis, one)
            at += slots[name].count
        return cls(slots, at)

    @property
    def input(self) -> Input:
        """The step's input that holds all factors."""
        return Input(RATES, (self.size,), "float32")

    def vector(self, updated: Mapping[str, float]) -> np.ndarray:
        """The factors with which exactly `updated` (tensor -> share, see ir/part.py) learns.

        A part on another axis than the slot's cannot be told by one factor a channel: ValueError.
        """
        vector = np.zeros(self.size, np.float32)
        for name, share in updated.items():
            slot = self.slots[name]
            if not isinstance(share, Part):
                vector[slot.begin : slot.begin + slot.count] = 1
            elif share.axis == slot.axis:
                vector[slot.begin + np.asarray(share.indices)] = 1
            else:
                raise ValueError(f"'{name}' has factors for axis {slot.axis}, not {share.axis}")
        return vector
