"""What MODEL on the command line names: a zoo model, a user's function, an ONNX file."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from pocktvm.errors import PockError
from pocktvm.frontend.weights import load_weights
from pocktvm.models import build, canonical_name

DEFAULT_BATCH = 8


@dataclass(frozen=True)
class Source:
    """A module ready for import_model. `module` is an nn.Module, or the path of an ONNX file."""

    module: Any
    example_inputs: Any
    name: str
    scheme: Mapping[str, Any] | None = None
    mean: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()
    loss: str = "cross_entropy"

    def facts(self) -> dict[str, Any]:
        """What else than module and inputs a build takes from it."""
        return {
            "name": self.name, "published": self.scheme, "mean": self.mean, "scale": self.scale,
        }  # fmt: skip


def resolve_model(spec: str, *, batch: int | None = None, weights: Path | None = None) -> Source:
    """Build what `spec` names: a zoo model with options, path/file.py:function, or an ONNX file.

    `batch` is for the zoo, for functions that take it, and for ONNX files whose first axis is open;
    `weights` a safetensors file with the module's names (an ONNX file holds its own). Raises
    PockError with the next step.
    """
    if spec.split(":")[0].endswith(".py"):
        return _from_file(spec, batch, weights)
    if spec.endswith(".onnx"):
        return _from_onnx(spec, batch, weights)
    return _from_zoo(spec, batch, weights)


def _from_zoo(spec: str, batch: int | None, weights: Path | None) -> Source:
    name, _, text = spec.partition(":")
    options = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = item.partition("=")
        if not equals:
            raise PockError(
                f"the option '{item}' of '{name}' has no value; write {name}:{key}=VALUE."
            )
        options[key.strip()] = value.strip()
    zoo = build(name, options, DEFAULT_BATCH if batch is None else batch)
    if weights is not None:
        hint = "Options of the zoo decide the names and shapes: classes, width, bn, head=new, …"
        load_weights(zoo.module, weights, rename=zoo.rename, fresh=zoo.fresh, hint=hint)
    return Source(
        module=zoo.module,
        example_inputs=zoo.example_inputs,
        name=canonical_name(name),
        scheme=zoo.scheme,
        mean=zoo.mean,
        scale=zoo.scale,
        loss=zoo.loss,
    )


def _from_file(spec: str, batch: int | None, weights: Path | None) -> Source:
    path_text, _, function_name = spec.rpartition(":") if ":" in spec else (spec, "", "")
    path = Path(path_text)
    if not path.is_file():
        raise PockError(f"there is no file '{path}' (the model is path/file.py:function).")
    if not function_name:
        raise PockError(f"'{spec}' names no function; write {spec}:function.")
    function = _function(_load(path), function_name, path)
    result = _call(function, _batch_argument(function, batch, spec), spec)
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], nn.Module)):
        raise PockError(
            f"{spec} returned {_describe(result)}; it has to return (module, example_inputs), "
            "an nn.Module and a tuple of tensors."
        )
    module, example_inputs = result
    if weights is not None:
        load_weights(module, weights)
    return Source(module, example_inputs, name=f"{path.stem}_{function_name}")


def _from_onnx(spec: str, batch: int | None, weights: Path | None) -> Source:
    """The path itself; inputs without memory that tell the batch, where the file leaves it open."""
    from pocktvm.frontend.onnx_file import input_shapes

    path = Path(spec)
    if weights is not None:
        raise PockError(f"'{path}' holds its weights: leave out --weights.")
    shapes, open_batch = input_shapes(path, batch)
    inputs = tuple(torch.empty(s, device="meta") for s in shapes.values()) if open_batch else ()
    return Source(path, inputs, name=path.stem)


def _load(path: Path) -> ModuleType:
    """The user's file as a module of its own, its folder importable while it loads."""
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    name = f"pocktvm_user_{path.stem}_{digest}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise PockError(f"'{path}' cannot be loaded as Python.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        sys.modules.pop(name, None)
        raise PockError(f"'{path}' fails when loaded: {_where(error, path)}") from error
    finally:
        sys.path.remove(str(path.resolve().parent))
    return module


def _function(module: ModuleType, name: str, path: Path) -> Callable[..., Any]:
    function = getattr(module, name, None)
    if callable(function):
        return function
    there = [n for n, f in vars(module).items() if inspect.isfunction(f) and not n.startswith("_")]
    there = [n for n in there if getattr(module, n).__module__ == module.__name__] or there
    close = difflib.get_close_matches(name, there, n=3, cutoff=0.4) or there[:8]
    raise PockError(
        f"'{path}' has no function '{name}'"
        + (f"; nearest: {', '.join(close)}." if close else "; it defines none.")
    )


def _batch_argument(function: Callable[..., Any], batch: int | None, spec: str) -> dict[str, int]:
    parameters = inspect.signature(function).parameters
    takes = "batch" in parameters
    needed = [
        p.name
        for p in parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    if set(needed) - {"batch"}:
        raise PockError(
            f"{spec} needs arguments ({', '.join(needed)}); it is called with none, or with batch=."
        )
    if batch is not None and not takes:
        raise PockError(
            f"--batch {batch}: {spec} takes no batch=. Give the function a batch parameter, or "
            "leave --batch out and the batch is that of its example inputs."
        )
    if batch is not None:
        return {"batch": batch}
    return {"batch": DEFAULT_BATCH} if "batch" in needed else {}


def _call(function: Callable[..., Any], arguments: dict[str, int], spec: str) -> Any:
    try:
        return function(**arguments)
    except Exception as error:
        path = Path(inspect.getsourcefile(function) or "")
        raise PockError(f"{spec} fails: {_where(error, path)}") from error


def _where(error: BaseException, path: Path) -> str:
    """`ValueError: text (file.py, line 3)`, the innermost line in the user's file."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f.lineno for f in frames if Path(f.filename).name == path.name]
    line = getattr(error, "lineno", None) if isinstance(error, SyntaxError) else None
    number = line or (own[-1] if own else None)
    place = f" ({path.name}, line {number})" if number else ""
    text = str(error).splitlines()[0][:300] if str(error) else ""
    return f"{type(error).__name__}: {text}{place}."


def _describe(result: Any) -> str:
    if isinstance(result, tuple):
        return f"a tuple of {', '.join(type(r).__name__ for r in result) or 'nothing'}"
    name = type(result).__name__
    article = "an" if name[0].lower() in "aeiou" else "a"
    return "nothing" if result is None else f"{article} {name}"
