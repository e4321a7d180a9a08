"""The zoo: plain PyTorch, one file a model, each with `build(options, batch) -> ZooModel`."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping

from pocktvm.errors import PockError
from pocktvm.models.common import ZooModel

__all__ = ["MODELS", "ZooModel", "build", "canonical_name"]

# name -> (file, options it sets)
MODELS: dict[str, tuple[str, dict[str, str]]] = {
    "mobilenetv2": ("mobilenetv2", {}),
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
