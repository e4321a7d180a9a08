"""The zoo: plain PyTorch, one file a model, each with `build(options, batch) -> ZooModel`."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping

from pocktvm.errors import PockError
from pocktvm.models.common import ZooModel

__all__ = ["MODELS", "ZooModel", "build", "canonical_name"]

# name -> (file, options it sets; the user's options come after)
MODELS: dict[str, tuple[str, dict[str, str]]] = {
    "mobilenetv2": ("mobilenetv2", {}),
    "mcunet": ("mcunet", {}),
    "resnet18": ("resnet", {"depth": "18"}),
    "resnet50": ("resnet", {"depth": "50"}),
    "vit-tiny": ("vit", {}),
    "bert": ("bert", {}),
    "distilbert": ("bert", {"depth": "6", "types": "0", "act": "relu"}),
    "minilm": (
        "bert",
        {"depth": "6", "dim": "384", "hidden": "1536", "pool": "mean", "mask": "pad"},
    ),
    "llama": ("llama", {}),
    "stories260k": (
        "llama",
        {"depth": "5", "dim": "64", "heads": "8", "kv": "4", "hidden": "172", "vocab": "512"},
    ),
    "cnn": ("cnn", {}),
    "mlp": ("mlp", {}),
}


def canonical_name(name: str) -> str:
    """The zoo's spelling; PockError with the nearest names when there is no such model."""
    text = name.lower().replace("_", "-")
    if text in MODELS:
        return text
    close = difflib.get_close_matches(text, list(MODELS), n=3, cutoff=0.4)
    raise PockError(
        f"there is no zoo model '{name}'"
        + (f"; nearest: {', '.join(close)}" if close else "")
        + f".\n  The zoo has {', '.join(MODELS)}; a model of your own is path/file.py:function."
    )


def build(name: str, options: Mapping[str, str] | None = None, batch: int = 8) -> ZooModel:
    """A zoo model with seeded weights and example inputs of the given batch.

    The caller's random number generator is not touched. Raises PockError for an unknown model,
    option or value, with what there is.
    """
    file, fixed = MODELS[canonical_name(name)]
    module = importlib.import_module(f"pocktvm.models.{file}")
    return module.build({**fixed, **(options or {})}, batch)
