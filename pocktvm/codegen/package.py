"""What lies in the artifact folder beside the library: initial weights and the manifest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pocktvm.codegen.step import fingerprint, label_names
from pocktvm.ir.artifact import Identity
from pocktvm.ir.graph import Param
from pocktvm.ir.kernels import Kernels
from pocktvm.ir.memory import MemoryPlan
from pocktvm.ir.target import Target
from pocktvm.manifest import MANIFEST


def initial_state(kernels: Kernels, identity: Identity) -> dict[str, np.ndarray]:
    """What weights.safetensors holds: torch's parameters, and trained tensors that torch does not
    know (LoRA's), by name, in torch's layout.
    """
    state = {name: np.asarray(value) for name, value in identity.state.items()}
    for param in kernels.params.values():
        if param.kind == "trained" and param.name not in state:
            state[param.name] = np.ascontiguousarray(param.in_torch(param.value))
    return state


def write_manifest(
    folder: Path, kernels: Kernels, plan: MemoryPlan, identity: Identity, target: Target
) -> None:
    """Write manifest.json, after all other files: it holds their hashes."""
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
            **({} if p.part is None else {"axis": p.part.axis, "indices": list(p.part.indices)}),
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
