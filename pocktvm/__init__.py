"""pocktvm: a model in, one shared library out that trains on the device that holds it."""

from __future__ import annotations

from importlib import import_module
from typing import Any

# Public names are imported on first use: loading an artifact must not import torch or TVM.
_HOMES = {
    "compile": "pocktvm.api",
    "load": "pocktvm.runtime.trainer",
    "evaluate": "pocktvm.experiment",
    "Trainer": "pocktvm.runtime.trainer",
    "Artifact": "pocktvm.artifact",
    "Scheme": "pocktvm.ir.scheme",
    "LoRA": "pocktvm.ir.lora",
    "Target": "pocktvm.ir.target",
    "SGD": "pocktvm.autodiff.optimizers",
    "Adam": "pocktvm.autodiff.optimizers",
    "AdamW": "pocktvm.autodiff.optimizers",
    "Lion": "pocktvm.autodiff.optimizers",
    "PockError": "pocktvm.errors",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pocktvm' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
