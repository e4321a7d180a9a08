"""MobileNetV2 (Sandler et al., arXiv 1801.04381), any width.

`padding=same` is TensorFlow's, which the published TensorFlow weights need; `bn=folded` has biased
convolutions instead of batch norms, as those files have. torchvision's names are understood.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pocktvm.models.common import (
    IMAGENET_MEAN,
    IMAGENET_SCALE,
    ConvNorm,
    ZooModel,
    build_seeded,
    fold_norms,
    images,
    read_options,
    settle_statistics,
)

OPTIONS = {
    "width": 1.0,
    "image": 128,
    "classes": 10,
    "padding": ("torch", "same"),
    "bn": ("stored", "folded"),
    "eps": 1e-5,
    "pixels": ("127.5", "128", "imagenet"),
    "head": ("file", "new"),
    "seed": 0,
}

# expansion, channels, repeats, stride of the first: table 2 of the paper
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
PIXELS = {
    "127.5": ((127.5,) * 3, (1 / 127.5,) * 3),
    "128": ((128.0,) * 3, (1 / 128,) * 3),
    "imagenet": (IMAGENET_MEAN, IMAGENET_SCALE),
}


def scaled(channels: float) -> int:
    """Channels rounded to a multiple of 8, never below 90 % of what was asked."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


class InvertedResidual(nn.Module):
    """1×1 up (`pw1`), depthwise (`dw`), 1×1 down (`pw2`), and the input added where it fits."""

    def __init__(
        self, inputs: int, hidden: int, outputs: int, kernel: int, stride: int, **norm: Any
    ) -> None:
        super().__init__()
        self.residual = stride == 1 and inputs == outputs
        self.pw1 = ConvNorm(inputs, hidden, **norm) if hidden != inputs else None
        self.dw = ConvNorm(hidden, hidden, kernel, stride, groups=hidden, **norm)
        self.pw2 = ConvNorm(hidden, outputs, act=None, **norm)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, O, H / stride, W / stride)."""
        y = x if self.pw1 is None else self.pw1(x)
        y = self.pw2(self.dw(y))
        return x + y if self.residual else y


class MobileNetV2(nn.Module):
    """Images (N, 3, H, W) to logits (N, classes)."""

    def __init__(self, width: float = 1.0, classes: int = 10, **norm: Any) -> None:
        super().__init__()
        inputs = scaled(32 * width)
        self.stem = ConvNorm(3, inputs, 3, 2, **norm)
        blocks = []
        for expansion, channels, repeats, first_stride in STAGES:
            for repeat in range(repeats):
                outputs = scaled(channels * width)
                stride = first_stride if repeat == 0 else 1
                hidden = inputs * expansion
                blocks.append(InvertedResidual(inputs, hidden, outputs, 3, stride, **norm))
                inputs = outputs
        self.blocks = nn.ModuleList(blocks)
        last = max(1280, scaled(1280 * width))
        self.head = ConvNorm(inputs, last, **norm)
        self.fc = nn.Linear(last, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) to logits (N, classes)."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.fc(self.head(x).mean((2, 3)))


def published_scheme(folded: bool) -> dict[str, int]:
    """PockEngine's: biases of the last 7 blocks, the first 1×1 convolution of each, classifier."""
    scheme: dict[str, int] = {}
    for block in range(10, 17):
        scheme[f"blocks.{block}.*.0.bias" if folded else f"blocks.{block}.*.1.bias"] = 1
        scheme[f"blocks.{block}.pw1.0.weight"] = 1
    return scheme | {"fc.*": 1}


def zoo_name(name: str) -> str:
    """torchvision's names: features.3.conv.1.0.weight -> blocks.2.dw.0.weight."""
    match = re.fullmatch(r"features\.(\d+)\.(.*)", name)
    if not match:
        return name.replace("classifier.1.", "fc.")
    index, rest = int(match[1]), match[2]
    if index in (0, 18):
        return ("stem." if index == 0 else "head.") + rest
    parts = ["dw", "pw2"] if index == 1 else ["pw1", "dw", "pw2"]
    _, position, *leaf = rest.split(".")
    if len(leaf) == 1:  # the last convolution has no Sequential of its own; its norm is next to it
        leaf = [str(int(position) - len(parts) + 1), *leaf]
        position = str(len(parts) - 1)
    return ".".join([f"blocks.{index - 1}", parts[int(position)], *leaf])


def build(options: Mapping[str, str], batch: int) -> ZooModel:
    """The zoo's entry."""
    o = read_options("mobilenetv2", OPTIONS, options)
    folded = o["bn"] == "folded"

    def make() -> nn.Module:
        model = MobileNetV2(o["width"], o["classes"], same=o["padding"] == "same", eps=o["eps"])
        settle_statistics(model)
        if folded:
            fold_norms(model)
        return model

    mean, scale = PIXELS[o["pixels"]]
    return ZooModel(
        module=build_seeded(o["seed"], make),
        example_inputs=(images(batch, o["image"]),),
        scheme=published_scheme(folded),
        mean=mean,
        scale=scale,
        rename=zoo_name,
        fresh=("fc.",) if o["head"] == "new" else (),
    )
