"""The table of reference operators: `Node.op` -> a function of torch tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch

from pocktvm.ir.graph import Node, Value
from pocktvm.registry import entry

Tensor: TypeAlias = torch.Tensor
Rule = Callable[[Node, Sequence[Tensor], Sequence[Value]], "Tensor | tuple[Tensor, ...]"]

RULES: dict[str, Rule] = {}


def reference(*names: str) -> Callable[[Rule], Rule]:
    """Register `rule(node, args, outs)` for these operators; `outs` are the outputs' types."""
    return entry(RULES, *names)


def gradient_of(forward: Callable[[Tensor], Tensor], at: Tensor, dy: Tensor) -> Tensor:
    """dx of `forward` at `at`, by torch's autograd."""
    with torch.enable_grad():
        x = at.detach().requires_grad_(True)
        return torch.autograd.grad(forward(x), x, dy)[0]
