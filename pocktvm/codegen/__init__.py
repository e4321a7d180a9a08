"""Kernels and a plan into an artifact folder: tables in C, objects, one library, a runner."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from pocktvm.codegen import cuda, link
from pocktvm.codegen.blob import Blob, assembly
from pocktvm.codegen.mach_o import hide_symbols
from pocktvm.codegen.package import initial_state, write_manifest
from pocktvm.codegen.step import generate_tables, image_symbol
from pocktvm.files import replacing_folder
from pocktvm.ir.artifact import Identity, SelfTest
from pocktvm.ir.kernels import Kernels
from pocktvm.ir.memory import MemoryPlan
from pocktvm.ir.target import Target
from pocktvm.runtime.tensor_file import write_tensors

# Code reaches its constants by 32-bit displacements: beyond this the weights are their own file.
EMBED_LIMIT_BYTES = 1_500_000_000
FROZEN_FILE = "frozen.bin"


def emit_artifact(
    kernels: Kernels,
    plan: MemoryPlan,
    identity: Identity,
    selftest: SelfTest,
    target: Target,
    out: Path,
) -> Path:
    """Write the artifact folder (docs/runtime.md) to `out`, whole or not at all; returns `out`.

    PockError: the place cannot be written, the disk is full, the linker is missing.
    """
    kernels.check()
    with replacing_folder(Path(out)) as folder:
        with tempfile.TemporaryDirectory(prefix="pocktvm-link-", dir=folder.parent) as work:
            _build(kernels, plan, identity, selftest, target, Path(work), folder)
        write_tensors(folder / "weights.safetensors", initial_state(kernels, identity))
        shutil.copy(link.C_FOLDER / "pocktvm.h", folder)
        write_manifest(folder, kernels, plan, identity, target)
    return Path(out)


def _build(
    kernels: Kernels,
    plan: MemoryPlan,
    identity: Identity,
    selftest: SelfTest,
    target: Target,
    work: Path,
    folder: Path,
) -> None:
    """The library and the runner, made in `work`, finished in `folder`."""
    toolchain = target.toolchain
    frozen, recorded = Blob(work / FROZEN_FILE), Blob(work / "recorded.bin")
    limit = int(os.environ.get("POCKTVM_EMBED_LIMIT", EMBED_LIMIT_BYTES))
    beside = sum(a.nbytes for a in kernels.consts.values()) > limit
    images = _images(kernels, target)
    tables = generate_tables(
        kernels, plan, identity, selftest, target, frozen, recorded,
        frozen_file=FROZEN_FILE if beside else None, images=images,
    )  # fmt: skip
    (work / "model.c").write_text(tables)
    if dump := os.environ.get("POCKTVM_DUMP"):
        Path(dump).mkdir(parents=True, exist_ok=True)
        (Path(dump) / "model.c").write_text(tables)
    embedded = {"pk_recorded_bytes": recorded.path}
    for index, image in enumerate(images):
        embedded[image_symbol(index)] = work / f"gpu.{index}.{image.arch}"
        embedded[image_symbol(index)].write_bytes(image.data)
    if beside:
        shutil.move(frozen.path, folder / FROZEN_FILE)
    else:
        embedded["pk_frozen_bytes"] = frozen.path
    (work / "bytes.S").write_text(assembly(embedded, mach_o=link.is_mach_o(toolchain)))
    objects: list[Path] = []
    used = {c.symbol for p in kernels.programs.values() for c in p.calls}
    for symbol in () if target.is_gpu else sorted(used):
        objects.append(work / f"{symbol}.o")
        data = kernels.kernels[symbol].object
        objects[-1].write_bytes(hide_symbols(data) if link.is_mach_o(toolchain) else data)
    sources = [work / "model.c", work / "bytes.S"]
    if target.is_gpu:
        sources.append(link.C_FOLDER / "cuda.c")
    link.link_library(toolchain, sources, objects, work / toolchain.library)
    shutil.move(work / toolchain.library, folder)
    runner = folder / "pocktvm-run"
    if toolchain.static_runner:
        link.link_static_runner(toolchain, sources, objects, work / "pocktvm-run")
        shutil.move(work / "pocktvm-run", runner)
    else:
        shutil.copy(link.dynamic_runner(toolchain), runner)
    runner.chmod(0o755)


def _images(kernels: Kernels, target: Target) -> list[cuda.Image]:
    """The GPU's code; none for a processor."""
    if not target.is_gpu:
        return []
    source = cuda.source_of(kernels)
    if dump := os.environ.get("POCKTVM_DUMP"):
        Path(dump).mkdir(parents=True, exist_ok=True)
        (Path(dump) / "kernels.cu").write_text(source)
    return cuda.compile_images(source, target.toolchain)
