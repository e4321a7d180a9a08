"""A multilayer perceptron: the smallest thing that learns."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pocktvm.models.common import ZooModel, build_seeded, read_options

OPTIONS = {"inputs": 64, "hidden": 128, "depth": 3, "classes": 10, "seed": 0}


class Layer(nn.Module):
    """A linear layer and ReLU: one block of the perceptron."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        nn.init.kaiming_normal_(self.linear.weight)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs) to (N, outputs)."""
        return self.act(self.linear(x))


class MLP(nn.Module):
    """Vectors (N, inputs) to logits (N, classes)."""

    def __init__(self, inputs: int, hidden: int, depth: int, classes: int) -> None:
        super().__init__()
        widths = [inputs] + [hidden] * depth
        pairs = itertools.pairwise(widths)
        self.blocks = nn.ModuleList(Layer(a, b) for a, b in pairs)
        self.fc = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs) to (N, classes)."""
        for block in self.blocks:
            x = block(x)
        return self.fc(x)


def build(options: Mapping[str, str], batch: int) -> ZooModel:
    """The zoo's entry."""
    o = read_options("mlp", OPTIONS, options)
    generator = torch.Generator().manual_seed(1)
    return ZooModel(
        module=build_seeded(
            o["seed"], lambda: MLP(o["inputs"], o["hidden"], o["depth"], o["classes"])
        ),
        example_inputs=(torch.randn(batch, o["inputs"], generator=generator),),
        scheme={"blocks.*.bias": 1, "fc.*": 1},
    )
