"""Drives zig: compiles the runtime's C (once per target) and links libraries and runners.

`zig cc` cross-links for every target with no SDK. Objects of the runtime and the dynamic runner do
not depend on the model; they are kept in a cache folder under a hash of sources, flags and zig.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path

from pocktvm.errors import InternalError, PockError
from pocktvm.files import cache_dir
from pocktvm.ir.target import Toolchain

C_FOLDER = Path(__file__).parent.parent / "runtime" / "c"
RUNTIME = ("runtime", "threads", "affinity", "checkpoint", "restore", "lock", "select",
           "safetensors", "inputs", "kernel_abi", "process")  # fmt: skip
RUNNER = ("main", "train", "source", "generate", "selftest", "serve", "library", "json")
TIMER = ("threads", "affinity", "kernel_abi", "process")
LOADER = ("elf_loader", "elf_imports")
_NEARLY_FULL_BYTES = 30_000_000
_NO_SPACE = re.compile("NoSpaceLeft|No space left")
_FLAGS = (
    "-std=gnu11", "-O2", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-g0",
    "-fno-sanitize=all", "-D_FILE_OFFSET_BITS=64", "-Wall", "-Wextra",
)  # fmt: skip
# zig builds its libc by the same flags: position-independent, a static program's malloc would ask
# for thread-local storage by a call that nobody answers (seen on Hexagon: it jumps to 0)
_STATIC = ("-static", "-fno-pic")


def is_mach_o(toolchain: Toolchain) -> bool:
    """True for Apple's object format."""
    return "macos" in toolchain.zig_target


def cache_folder() -> Path:
    """Where objects that do not depend on the model are kept."""
    folder = cache_dir() / "runtime"
    folder.mkdir(exist_ok=True)
    return folder


def _zig_cache() -> Path:
    """Where zig keeps the libcs it built: its own folder, or ours where that cannot be written."""
    if own := os.environ.get("ZIG_GLOBAL_CACHE_DIR"):
        return Path(own)
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zig"
    above = next(p for p in (folder, *folder.parents) if p.exists())
    return folder if os.access(above, os.W_OK) else cache_dir() / "zig"


def zig(arguments: Sequence[str | Path], what: str) -> None:
    """Run `zig cc`; PockError when zig is missing or the disk is full, InternalError otherwise."""
    command = [sys.executable, "-m", "ziglang", "cc", *map(str, arguments)]
    with tempfile.TemporaryDirectory(prefix="pocktvm-zig-") as local:
        # zig would keep a copy of every object of every model in its cache
        environment = {
            **os.environ, "ZIG_LOCAL_CACHE_DIR": local, "ZIG_GLOBAL_CACHE_DIR": str(_zig_cache()),
            "TMPDIR": tempfile.gettempdir(),  # $TMPDIR may be full or read-only, this one is not
        }  # fmt: skip
        # restore_signals=False: a file size limit is then an error that zig can report
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, restore_signals=False
        )
    if done.returncode == 0:
        return
    if "No module named ziglang" in done.stderr:
        raise PockError("the linker is missing: pip install ziglang==0.17.1")
    # zig maps its output, so a full disk kills it without a word
    temporary = Path(tempfile.gettempdir())
    for folder in (temporary, cache_folder(), *_folders_of(arguments), Path.home()):
        free = shutil.disk_usage(folder).free if folder.is_dir() else _NEARLY_FULL_BYTES
        if free < _NEARLY_FULL_BYTES or _NO_SPACE.search(done.stderr):
            raise PockError(
                f"the disk is full: {free / 1e6:.1f} MB are free on {_disk(folder)}, and {what} "
                "could not be made.\n  Free some space and build again."
            )
    raise InternalError(f"zig failed on {what}:\n{' '.join(command)}\n{done.stderr[-4000:]}")


def _disk(folder: Path) -> Path:
    path = folder.absolute()
    while not path.is_mount():
        path = path.parent
    return path


def _folders_of(arguments: Sequence[str | Path]) -> list[Path]:
    return [Path(arguments[i + 1]).parent for i, a in enumerate(arguments[:-1]) if a == "-o"]


def target_flags(toolchain: Toolchain) -> list[str]:
    """zig's flags that select the device: triple, CPU, and what its TOML adds."""
    cpu = [f"-mcpu={toolchain.zig_cpu}"] if toolchain.zig_cpu else []
    # our own loader sets up no thread-local storage
    loader = ["-DPOCKTVM_NO_TLS"] if toolchain.own_loader else []
    return ["-target", toolchain.zig_target, *cpu, *loader, *toolchain.flags]


@cache
def _sources_hash() -> str:
    digest = hashlib.sha256(version("ziglang").encode())
    for path in sorted(C_FOLDER.glob("*.[ch]")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _cached(toolchain: Toolchain, kind: str, flags: Sequence[str] = ()) -> Path:
    key = repr((_sources_hash(), target_flags(toolchain), _FLAGS, flags, kind))
    return cache_folder() / f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:24]}"


def _fill(folder: Path, scratch: Path) -> Path:
    """Put a finished folder in its place; another process may have been faster."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        scratch.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
    return folder


def runtime_objects(toolchain: Toolchain) -> list[Path]:
    """The C runtime compiled for a target."""
    folder = _cached(toolchain, "objects")
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            made = Path(scratch) / "objects"
            made.mkdir()
            for name in RUNTIME:
                _compile(toolchain, C_FOLDER / f"{name}.c", made / f"{name}.o")
            _fill(folder, made)
    return [folder / f"{name}.o" for name in RUNTIME]


def _compile(toolchain: Toolchain, source: Path, output: Path) -> None:
    zig(
        [*target_flags(toolchain), *_FLAGS, f"-I{C_FOLDER}", "-c", source, "-o", output],
        source.name,
    )


def dynamic_runner(toolchain: Toolchain) -> Path:
    """pocktvm-run that loads a model's library."""
    flags = [] if is_mach_o(toolchain) else ["-ldl", "-s"]
    if toolchain.own_loader:
        flags += [*_STATIC, "-DPOCKTVM_OWN_LOADER", "-lm"]
    folder = _cached(toolchain, "runner", flags)
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            made = Path(scratch) / "runner"
            made.mkdir()
            names = [*RUNNER, "safetensors", *(LOADER if toolchain.own_loader else ())]
            sources = [C_FOLDER / f"{name}.c" for name in names]
            zig(
                [*target_flags(toolchain), *_FLAGS, f"-I{C_FOLDER}", *sources, *flags,
                 "-o", made / "pocktvm-run"],
                "pocktvm-run",
            )  # fmt: skip
            _fill(folder, made)
    return folder / "pocktvm-run"


def link_timer(toolchain: Toolchain, headers: Path, kernel: Path, output: Path) -> None:
    """The program that times one kernel; `headers` holds its candidate.h."""
    objects = [p for p in runtime_objects(toolchain) if p.stem in TIMER]
    flags = [*_STATIC] if toolchain.own_loader else []
    flags += [] if is_mach_o(toolchain) else ["-s", "-lpthread", "-lm"]
    source = C_FOLDER / "time_kernel.c"
    zig(
        [*target_flags(toolchain), *_FLAGS, f"-I{C_FOLDER}", f"-I{headers}", source, kernel,
         *objects, *flags, "-o", output],
        "a candidate",
    )  # fmt: skip


def link_library(toolchain: Toolchain, sources: Sequence[Path], objects: Sequence[Path],
                 output: Path) -> None:  # fmt: skip
    """One shared library that exports pocktvm.h's functions and nothing else."""
    work = output.parent
    flags: list[str | Path] = ["-shared"]
    if is_mach_o(toolchain):
        flags += ["-Wl,-install_name,@rpath/" + output.name, "-Wl,-dead_strip"]
    else:
        script = work / "exports.map"
        script.write_text("{ global: pocktvm_*; local: *; };\n")
        flags += [f"-Wl,--version-script={script}", "-Wl,--gc-sections", "-Wl,-z,noexecstack", "-s"]
        flags += [f"-Wl,-soname,{output.name}"]
        if toolchain.own_loader:  # libc comes from the runner; symbols are found in the old table
            flags += ["-nostdlib", "-rtlib=compiler-rt", "-Wl,--hash-style=sysv"]
        else:
            flags += ["-lpthread", "-ldl", "-lm"]
    _link(toolchain, sources, objects, [*flags, "-o", output], output.name, work)


def link_static_runner(toolchain: Toolchain, sources: Sequence[Path], objects: Sequence[Path],
                       output: Path) -> None:  # fmt: skip
    """pocktvm-run with the model inside, for a device without a loader."""
    runner = [C_FOLDER / f"{name}.c" for name in RUNNER]
    flags: list[str | Path] = [*_STATIC, "-DPOCKTVM_STATIC", "-s", "-o", output]
    _link(toolchain, [*sources, *runner], objects, flags, output.name, output.parent)


def _link(toolchain: Toolchain, sources: Sequence[Path], objects: Sequence[Path],
          flags: Sequence[str | Path], what: str, work: Path) -> None:  # fmt: skip
    # hundreds of kernels do not fit on a command line
    listing = work / "objects.txt"
    listing.write_text("".join(f'"{p}"\n' for p in [*objects, *runtime_objects(toolchain)]))
    zig([*target_flags(toolchain), *_FLAGS, f"-I{C_FOLDER}", *sources, f"@{listing}", *flags], what)
    listing.unlink()
