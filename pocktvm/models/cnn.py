"""A small convolutional net: convolution, batch norm, ReLU, max pooling, and a linear layer."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from pocktvm.errors import PockError
from pocktvm.models.common import (
    ConvNorm,
    ZooModel,
    build_seeded,
    images,
    read_options,
    settle_statistics,
)

OPTIONS = {"channels": 16, "depth": 3, "image": 32, "inputs": 3, "classes": 10, "seed": 0}


class CNN(nn.Module):
    """Images (N, inputs, H, W) to logits (N, classes); each block halves the image."""

    def __init__(self, inputs: int, channels: int, depth: int, classes: int) -> None:
        super().__init__()
        widths = [inputs] + [channels << i for i in range(depth)]
        self.blocks = nn.ModuleList(
            ConvNorm(widths[i], widths[i + 1], 3, act=nn.ReLU) for i in range(depth)
        )
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, inputs, H, W) to logits (N, classes)."""
        for block in self.blocks:
            x = self.pool(block(x))
        return self.fc(x.mean((2, 3)))


def build(options: Mapping[str, str], batch: int) -> ZooModel:
    """The zoo's entry."""
    o = read_options("cnn", OPTIONS, options)
    if o["image"] >> o["depth"] == 0:
        raise PockError(f"cnn: an image of {o['image']} cannot be halved {o['depth']} times.")

    def make() -> nn.Module:
        model = CNN(o["inputs"], o["channels"], o["depth"], o["classes"])
        settle_statistics(model, o["image"], o["inputs"])
        return model

    return ZooModel(
        module=build_seeded(o["seed"], make),
        example_inputs=(images(batch, o["image"], o["inputs"]),),
        mean=(127.5,) * o["inputs"],
        scale=(1 / 127.5,) * o["inputs"],
    )
