"""The artifact folder: written beside its place, then renamed into it; never half-written."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pocktvm.codegen.step import fingerprint, label_names, torch_array
from pocktvm.errors import PockError
from pocktvm.ir.artifact import Identity
from pocktvm.ir.graph import Param
from pocktvm.ir.kernels import Kernels
from pocktvm.ir.memory import MemoryPlan
from pocktvm.ir.target import Target

MANIFEST = "manifest.json"


@contextlib.contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """A fresh folder that takes the place of `out` when the block succeeds.

    Files of the user's own in an artifact folder (checkpoints) move to the new one. PockError: the
    place holds something else, cannot be written, or the disk is full.
    """
    out = out.absolute()
    _check_place(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise PockError(f"cannot write the artifact to {out}: {error.strerror}") from error
    try:
        fresh.chmod(0o755)
        yield fresh
        _keep_foreign(out, fresh)
        _swap(fresh, out)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        why = "the disk is full" if full else (error.strerror or str(error))
        raise PockError(
            f"cannot write the artifact to {out}: {why}; nothing was changed there.\n"
            "  Free some space, or name another folder with -o."
        ) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _check_place(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise PockError(f"{out} is a file; -o names the artifact's folder")
    if out.is_dir() and any(out.iterdir()) and not (out / MANIFEST).is_file():
        raise PockError(f"{out} holds other files; name an empty or a new folder with -o")


def _keep_foreign(out: Path, fresh: Path) -> None:
    """Link what an older build did not write; the old folder stays whole until the swap."""
    if not out.is_dir():
        return
    try:
        ours = set(json.loads((out / MANIFEST).read_text())["files"]) | {MANIFEST}
    except (OSError, ValueError, KeyError, TypeError):
        ours = {MANIFEST}
    for path in out.iterdir():
        if path.name in ours or (fresh / path.name).exists() or not path.is_file():
            continue
        try:
            os.link(path, fresh / path.name)
        except OSError:
            shutil.copy2(path, fresh / path.name)


def _swap(fresh: Path, out: Path) -> None:
    old = fresh.with_name(fresh.name + ".old")
    if out.exists():
        out.rename(old)
    try:
        fresh.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def initial_state(kernels: Kernels, identity: Identity) -> dict[str, np.ndarray]:
    """weights.safetensors: torch's parameters, and trained tensors torch does not know (LoRA's)."""
    state = {name: np.asarray(value) for name, value in identity.state.items()}
    for param in kernels.params.values():
        if param.kind == "trained" and param.name not in state:
            state[param.name] = torch_array(param)
    return state


def write_manifest(
    folder: Path, kernels: Kernels, plan: MemoryPlan, identity: Identity, target: Target
) -> None:
    """manifest.json, last: it holds the hash of every other file."""
    facts: dict[str, Any] = {
        **identity.extra,
        "format": 1,
        "model": identity.model,
        "target": target.name,
        "scheme": identity.scheme,
        "loss": identity.loss,
        "optimizer": identity.optimizer,
        "lr": identity.lr,
        "batch": identity.batch,
        "updated": dict(identity.updated),
        "aliases": {k: list(v) for k, v in identity.aliases.items()},
        "inputs": _inputs(kernels, identity),
        "output_shape": list(identity.output_shape),
        "tensors": _tensors(kernels),
        "plan": _plan(plan),
        "kernels": _kernel_counts(kernels),
        "rules": kernels.by_rule(),
        "fingerprint": fingerprint(kernels, identity.state),
        "library": target.toolchain.library,
        "arch": target.arch,
        "os": target.os,
        "checked": target.checked,
        "emulator": list(target.emulator),
        "static_runner": target.toolchain.static_runner,
        "versions": dict(identity.versions),
        "files": {p.name: _file(p) for p in sorted(folder.iterdir()) if p.name != MANIFEST},
    }
    text = json.dumps(facts, indent=1, default=_plain)
    (folder / MANIFEST).write_text(text + "\n")


def _file(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _plain(value: Any) -> Any:
    """numpy scalars and mappings as JSON knows them."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (set, frozenset, tuple)):
        return list(value)
    return str(value)


def _inputs(kernels: Kernels, identity: Identity) -> list[dict[str, Any]]:
    labels = label_names(kernels, identity.inputs)
    return [
        {
            "name": i.name, "shape": list(i.shape), "dtype": i.dtype, "bound": i.bound,
            "ignore_index": i.ignore_index, "mean": list(i.mean), "scale": list(i.scale),
            "label": i.name in labels,
        }
        for i in identity.inputs
    ]  # fmt: skip


def _tensors(kernels: Kernels) -> dict[str, dict[str, Any]]:
    params = sorted(kernels.params.values(), key=lambda p: p.name)
    return {
        p.name: {
            "kind": p.kind, "shape": list(p.torch_shape), "aliases": list(p.aliases),
            **({} if p.part is None else {"axis": p.part[0], "indices": list(p.part[1])}),
            **({} if p.selects is None else _selection(p, kernels.params[p.selects[0]])),
        }
        for p in params
    }  # fmt: skip


def _selection(param: Param, tensor: Param) -> dict[str, Any]:
    axis = (param.selects or ("", 0))[1]
    return {"of": tensor.name, "axis": axis, "extent": tensor.torch_shape[axis],
            "indices": param.value.tolist()}  # fmt: skip


def _plan(plan: MemoryPlan) -> dict[str, Any]:
    keys = ("arena_bytes", "lower_bound_bytes", "total_bytes", "persistent_bytes", "fast_bytes",
            "peak_call")  # fmt: skip
    return {**{k: getattr(plan, k) for k in keys}, "by_class": dict(plan.by_class)}


def _kernel_counts(kernels: Kernels) -> dict[str, int]:
    """Calls per origin: found by search, a rule's default, or the rule that accepts everything;
    `untuned`: those with something to tune and no record that fits."""
    counts = {"tuned": 0, "rule": 0, "fallback": 0, "untuned": 0}
    for program in kernels.programs.values():
        for call in program.calls:
            kernel = kernels.kernels[call.symbol]
            plain = "fallback" if kernel.rule == "fallback" else "rule"
            counts["tuned" if kernel.tuned else plain] += 1
            counts["untuned"] += not kernel.tuned and kernel.knobs > 1
    return counts
