"""A tensor that lives as long as the process, and how torch's tensor lies in the arena."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pocktvm.ir.part import Part


@dataclass(frozen=True)
class Param:
    """A parameter, an optimizer's state, or a choice of channels.

    name    torch's (`blocks.0.weight`); a state's is `<state>/<parameter>`, such as
            `exp_avg/blocks.0.weight`, a choice's `selection/<parameter>`; the graph's value has
            the same name
    value   what it starts as, in the stored layout
    kind    trained | optimizer | selection
    perm    torch's axes in the order they are stored, stored = torch_array.transpose(perm); None
            for torch's own order
    part    the only slice that ever changes; None: all of it does, or may
    selects of a selection (int32 indices, increasing): the tensor and torch's axis of it along
            which they learn. No step changes it, the caller may between steps

    Everything that leaves the arena (checkpoints, state_dict, pocktvm_tensor) is told in torch's
    axes, by `torch_shape` and `torch_strides`; kernels alone see the stored order.
    """

    name: str
    value: np.ndarray
    kind: str
    perm: tuple[int, ...] | None = None
    aliases: tuple[str, ...] = ()
    part: Part | None = None
    selects: tuple[str, int] | None = None

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """The shape torch knows the tensor by."""
        return self._of_torchs_axes(self.value.shape)

    @property
    def torch_strides(self) -> tuple[int, ...]:
        """Elements between neighbours in the stored tensor, along each of torch's axes."""
        shape = self.value.shape
        return self._of_torchs_axes(tuple(math.prod(shape[i + 1 :]) for i in range(len(shape))))

    def in_torch(self, array: np.ndarray) -> np.ndarray:
        """A stored array (this value, or one that replaces it) in torch's order of axes."""
        return array if self.perm is None else array.transpose(np.argsort(self.perm))

    def never_learns(self, torch_array: np.ndarray) -> np.ndarray:
        """What no step changes of the tensor, given in torch's axes: nothing, or all but `part`."""
        if self.part is None:
            return torch_array[:0]
        return np.delete(torch_array, self.part.indices, self.part.axis)

    def _of_torchs_axes(self, numbers: tuple[int, ...]) -> tuple[int, ...]:
        if self.perm is None:
            return tuple(numbers)
        return tuple(numbers[self.perm.index(axis)] for axis in range(len(numbers)))
