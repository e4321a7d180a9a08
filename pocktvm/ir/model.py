"""A model as a frontend delivers it: Relax plus what Relax does not say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Input:
    """A run-time input. `bound`: labels or ids must lie in [0, bound); None: any value.

    `mean`, `scale`: a uint8 sample becomes (u8 - mean[c]) * scale[c] on the device, c the axis 1.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str  # what the device reads: float32 | int32
    bound: int | None = None
    ignore_index: int | None = None
    mean: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()


@dataclass(frozen=True)
class Parameter:
    """A torch parameter: `aliases` are other names of the same tensor (tied weights)."""

    name: str
    value: np.ndarray
    requires_grad: bool = True
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Axes:
    """Where a weight has its channels: axis of the inputs, of the outputs, and its groups."""

    inputs: int = 1
    outputs: int = 0
    groups: int = 1


@dataclass(frozen=True)
class Model:
    """`module["main"]` is a Relax function of the inputs, then the parameters, in the order of the
    two mappings below; it returns one tensor. Buffers (BN statistics) are bound as constants.
    Integer variables may be int64 there, whatever `Input.dtype` says: they are narrowed later.

    blocks      names of the repeated blocks, in forward order (`blocks.0`, …); schemes count them
    classifier  prefixes of the parameters behind the last block (`fc`, `head.fc`, …)
    scheme      the published scheme of a zoo model, a mapping of patterns, or None
    (parameter name -> layer name is implied: text before the last dot)
    notices     one line each, told to the user once (train mode, dropout, …)
    """

    name: str
    module: Any  # tvm.ir.IRModule
    inputs: Mapping[str, Input]
    parameters: Mapping[str, Parameter]
    output_shape: tuple[int, ...]
    blocks: tuple[str, ...] = ()
    classifier: tuple[str, ...] = ()
    scheme: Mapping[str, Any] | None = None
    # conv weight -> bias of the BN behind it
    shifts: Mapping[str, str] = field(default_factory=dict)
    # embedding table -> its padding_idx (the row whose lookups give no gradient)
    padding: Mapping[str, int] = field(default_factory=dict)
    # weight -> its axes, where they are not the plain ones
    channels: Mapping[str, Axes] = field(default_factory=dict)
    # adapted weight -> its adapter (ir/lora.py)
    adapters: Mapping[str, Any] = field(default_factory=dict)
    # name of a variable in module["main"] -> torch layer it comes from, for messages
    layers: Mapping[str, str] = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    dropout: bool = False  # the training step drops; otherwise dropouts are identities
