"""The workloads every figure speaks of, as zoo models with a batch and two schemes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """A model, its batch, and what `sparse` means for it."""

    model: str
    batch: int
    what: str


WORKLOADS = {
    "w1a": Workload("mobilenetv2", 8, "MobileNetV2, batch 8 at 128x128"),
    "w1b": Workload("mobilenetv2:image=224", 1, "MobileNetV2, batch 1 at 224x224"),
    "w2": Workload("resnet50", 4, "ResNet-50, batch 4 at 128x128"),
    "w3": Workload(
        "encoder:layers=6,dim=768,heads=12,ffn=3072,tokens=128",
        4,
        "six-layer 768-wide encoder, batch 4 of 128 tokens",
    ),
    "w4": Workload(
        "llama:layers=6,dim=288,heads=6,ffn=768,vocab=32000,tokens=256",
        1,
        "Llama of stories15M's shape, batch 1 of 256 tokens",
    ),
}
SCHEMES = {"sparse": "pockengine", "full": "full"}
