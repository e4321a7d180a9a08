"""Weights from a safetensors file into a module, by name, all or nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pocktvm.errors import PockError

# Counts batches in training; a step with stored statistics does not read it.
IGNORED = ".num_batches_tracked"
LISTED = 6


def load_weights(
    module: nn.Module,
    path: Path,
    *,
    rename: Callable[[str], str | None] | None = None,
    fresh: Sequence[str] = (),
    hint: str = "",
) -> None:
    """Fill parameters and buffers of `module` from `path`; half precision is widened.

    `rename` maps a published file's names to the module's (None: ignore). What starts with a prefix
    in `fresh` stays as it is. Raises PockError that lists every name that is missing, extra or of
    another shape; nothing is loaded then.
    """
    tensors = _read(path)
    state = {n: t for n, t in module.state_dict().items() if not n.endswith(IGNORED)}
    tensors = _renamed(tensors, state, rename)
    wanted = {n for n in state if not n.startswith(tuple(fresh))} if fresh else set(state)
    groups = _tied(module)
    given = [n for n in state if n in wanted and n in tensors]
    known = {*given} | {name for n in given for name in groups.get(n, ())}
    problems = _problems(
        missing=[n for n in state if n in wanted and n not in known],
        extra=[n for n in tensors if n not in state],
        shapes={
            n: f"{list(tensors[n].shape)} in the file, {list(state[n].shape)} in the model"
            for n in given
            if _matrix(tensors[n].shape) != _matrix(state[n].shape)
        },
    )
    if problems:
        raise PockError(
            f"the weights '{path}' do not fit the model:\n{problems}"
            + (f"\n  {hint}" if hint else "\n  The names must be those of module.state_dict().")
        )
    with torch.no_grad():
        for name in given:
            state[name].copy_(tensors[name].view(state[name].shape))


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise PockError(f"there is no file of weights '{path}' (--weights).")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise PockError(
            f"the weights '{path}' cannot be read as safetensors: {error}.\n"
            "  Write them with safetensors.torch.save_file(module.state_dict(), path)."
        ) from error


def _renamed(
    tensors: dict[str, Tensor],
    state: dict[str, Tensor],
    rename: Callable[[str], str | None] | None,
) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in tensors.items():
        new = name if name in state or rename is None else rename(name)
        if new is not None and not name.endswith(IGNORED):
            renamed[new] = tensor
    return renamed


def _tied(module: nn.Module) -> dict[str, list[str]]:
    """Name -> all names of the same tensor."""
    by_tensor: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        by_tensor.setdefault(id(parameter), []).append(name)
    return {name: names for names in by_tensor.values() for name in names}


def _matrix(shape: torch.Size) -> tuple[int, ...]:
    """A 1×1 convolution's weight is a matrix."""
    dims = tuple(shape)
    while dims and dims[-1] == 1:
        dims = dims[:-1]
    return dims


def _problems(missing: list[str], extra: list[str], shapes: dict[str, str]) -> str:
    lines = []
    for title, names in (("missing in the file", missing), ("not in the model", extra)):
        if names:
            more = f", … {len(names)} in all" if len(names) > LISTED else ""
            lines.append(f"  {title}: {', '.join(names[:LISTED])}{more}")
    lines += [f"  {name}: {what}" for name, what in list(shapes.items())[:LISTED]]
    if len(shapes) > LISTED:
        lines.append(f"  … {len(shapes)} of another shape in all")
    return "\n".join(lines)
