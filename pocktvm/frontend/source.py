"""A model of any kind into the compiler: an nn.Module, or the path of an ONNX file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from pocktvm.errors import PockError
from pocktvm.frontend.channels import find_channels
from pocktvm.frontend.torch import import_torch
from pocktvm.ir.model import Model


def import_model(module: Any, example_inputs: Any, **options: Any) -> Model:
    """`import_torch`, or for the path of an .onnx file `import_onnx` at the inputs' batch."""
    model = _imported(module, example_inputs, **options)
    return replace(model, channels=find_channels(model.module["main"], list(model.parameters)))


def _imported(module: Any, example_inputs: Any, **options: Any) -> Model:
    if not isinstance(module, str | Path):
        return import_torch(module, example_inputs, **options)
    if Path(module).suffix != ".onnx":
        raise PockError(f"'{module}' is a path; compile takes an nn.Module or an .onnx file.")
    from pocktvm.frontend.onnx import import_onnx

    if options.pop("dropout", False):
        raise PockError(
            "an ONNX file's dropouts are not read.\n  Leave --dropout out, or compile the torch "
            "module the file came from."
        )
    if options.pop("scheme", None) is not None:
        raise PockError("an ONNX file has no published scheme: leave out `published`.")
    return import_onnx(module, batch=_batch(example_inputs), **options)


def _batch(example_inputs: Any) -> int | None:
    """The batch of the example inputs; None without any (the file's own)."""
    if isinstance(example_inputs, dict):
        example_inputs = tuple(example_inputs.values())
    given = example_inputs if isinstance(example_inputs, tuple | list) else (example_inputs,)
    shape = getattr(given[0], "shape", ()) if given else ()
    return int(shape[0]) if shape else None
