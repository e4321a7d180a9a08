"""The workloads every figure speaks of, as zoo models with a batch and two schemes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """A zoo model and its batch; `peers_model` where the peers' scripts have another variant."""

    model: str
    batch: int
    what: str
    other: str = ""

    @property
    def peers_model(self) -> str:
        """The zoo model whose parameters and arithmetic are those of the peers' scripts."""
        return self.other or self.model


WORKLOADS = {
    "w1a": Workload("mobilenetv2", 8, "MobileNetV2, batch 8 at 128x128"),
    "w1b": Workload("mobilenetv2:image=224", 1, "MobileNetV2, batch 1 at 224x224"),
    "w2": Workload("resnet50", 4, "ResNet-50, batch 4 at 128x128"),
    "w3": Workload(
        "bert:depth=6,types=0,act=relu", 4, "six-layer 768-wide encoder, batch 4 of 128 tokens"
    ),
    "w4": Workload(
        "llama", 1, "Llama of stories15M's shape, batch 1 of 256 tokens", other="llama:rope=half"
    ),
}
SCHEMES = {"sparse": "pockengine", "full": "full"}
