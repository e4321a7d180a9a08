"""MCUNet, the 5-frames-a-second ImageNet network (Lin et al., NeurIPS 2020; MIT-licensed weights).

Found by architecture search, so it is a table. ReLU6 everywhere, symmetric padding.
`bn=folded` has the published file's shape: biased convolutions, no batch norms.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pocktvm.models.common import (
    ConvNorm,
    ZooModel,
    build_seeded,
    fold_norms,
    images,
    read_options,
    settle_statistics,
)
from pocktvm.models.mobilenetv2 import InvertedResidual

OPTIONS = {
    "image": 128,
    "classes": 10,
    "bn": ("stored", "folded"),
    "head": ("file", "new"),
    "seed": 0,
}

# hidden channels, output channels, kernel, stride
BLOCKS = (
    (16, 8, 3, 1),
    (32, 16, 3, 2),
    (48, 16, 3, 1),
    (48, 24, 7, 2),
    (120, 24, 3, 1),
    (120, 40, 3, 2),
    (160, 40, 7, 1),
    (160, 48, 5, 1),
    (144, 48, 3, 1),
    (192, 48, 3, 1),
    (240, 96, 7, 2),
    (384, 96, 5, 1),
    (384, 96, 5, 1),
    (576, 160, 3, 1),
)
STEM = 16

FILE_NAMES = {
    "first_conv.": "stem.0.",
    "pointwise1.": "pw1.0.",
    "depthwise.": "dw.0.",
    "pointwise2.": "pw2.0.",
    "classifier.": "fc.",
}


class MCUNet(nn.Module):
    """Images (N, 3, H, W) to logits (N, classes)."""

    def __init__(self, classes: int = 10, **norm: Any) -> None:
        super().__init__()
        self.stem = ConvNorm(3, STEM, 3, 2, **norm)
        inputs = [STEM] + [row[1] for row in BLOCKS]
        self.blocks = nn.ModuleList(
            InvertedResidual(before, hidden, outputs, kernel, stride, **norm)
            for before, (hidden, outputs, kernel, stride) in zip(inputs, BLOCKS, strict=False)
        )
        self.fc = nn.Linear(inputs[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) to logits (N, classes)."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean((2, 3)))


def published_scheme(folded: bool) -> dict[str, float]:
    """PockEngine's: biases of the last 7 blocks, the first 1×1 of four in the middle, classifier.

    The third of the four has half of its input channels, as in the paper.
    """
    scheme: dict[str, float] = {}
    for block in range(7, 14):
        scheme[f"blocks.{block}.*.0.bias" if folded else f"blocks.{block}.*.1.bias"] = 1
    for block in (7, 8, 9, 10):
        scheme[f"blocks.{block}.pw1.0.weight"] = 0.5 if block == 9 else 1
    return scheme | {"fc.*": 1}


def zoo_name(name: str) -> str:
    """The published file's names: blocks.3.depthwise.weight -> blocks.3.dw.0.weight."""
    for theirs, ours in FILE_NAMES.items():
        name = name.replace(theirs, ours)
    return name


def build(options: Mapping[str, str], batch: int) -> ZooModel:
    """The zoo's entry."""
    o = read_options("mcunet", OPTIONS, options)
    folded = o["bn"] == "folded"

    def make() -> nn.Module:
        model = MCUNet(o["classes"])
        settle_statistics(model)
        if folded:
            fold_norms(model)
        return model

    return ZooModel(
        module=build_seeded(o["seed"], make),
        example_inputs=(images(batch, o["image"]),),
        scheme=published_scheme(folded),
        mean=(127.5,) * 3,
        scale=(1 / 127.5,) * 3,
        rename=zoo_name,
        fresh=("fc.",) if o["head"] == "new" else (),
    )
