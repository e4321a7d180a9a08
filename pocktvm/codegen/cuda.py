"""CUDA C to machine code (cubin) and PTX, by NVRTC or by nvcc; neither needs a GPU.

NVRTC comes as a pip package (the `jetson` extra); where it is missing, an `nvcc` on PATH serves. A
compiled image is kept under the hash of everything it was made from.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pocktvm.errors import InternalError, PockError
from pocktvm.files import cache_dir
from pocktvm.ir.kernels import Kernels
from pocktvm.ir.target import Toolchain

# What TVM's text uses beyond CUDA C; NVRTC has no standard headers, and nvcc includes only some.
PRELUDE = """\
#ifdef __CUDACC_RTC__
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
#else
#include <stdint.h>
#endif
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif
#define CUDART_INF_F INFINITY
"""
_MISSING = (
    "compiling for a GPU needs NVIDIA's NVRTC or nvcc, and neither is here.\n"
    "  pip install nvidia-cuda-nvrtc-cu12 (the jetson extra), or put the CUDA toolkit on PATH."
)


@dataclass(frozen=True)
class Image:
    """Code of all kernels for one architecture: sm_87 (a cubin) or compute_87 (PTX)."""

    arch: str
    data: bytes

    @property
    def is_ptx(self) -> bool:
        """True for text that the driver translates."""
        return self.arch.startswith("compute_")

    @property
    def capability(self) -> tuple[int, int]:
        """(major, minor) of the compute capability."""
        number = self.arch.partition("_")[2].rstrip("af")
        return int(number[:-1]), int(number[-1])


def source_of(kernels: Kernels) -> str:
    """One CUDA C file with every kernel of a model."""
    used = sorted({c.symbol for p in kernels.programs.values() for c in p.calls})
    return PRELUDE + "\n".join(kernels.kernels[symbol].object.decode() for symbol in used)


def compile_images(source: str, toolchain: Toolchain) -> list[Image]:
    """The images of a target, machine code first. PockError without a compiler."""
    wanted = [*toolchain.cubins, *([toolchain.ptx] if toolchain.ptx else [])]
    with ThreadPoolExecutor(max_workers=min(len(wanted), os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda arch: Image(arch, _cached(source, arch)), wanted))


def compile_ptx(source: str, arch: str) -> bytes:
    """PTX of some kernels, without the cache."""
    return _compile(PRELUDE + source, arch)


def lacks_compiler() -> str:
    """What is missing here to compile CUDA C; empty: nothing."""
    return "" if _nvrtc_path() or shutil.which("nvcc") else _MISSING.splitlines()[0]


def _cached(source: str, arch: str) -> bytes:
    key = hashlib.sha256(f"{_version()}\n{arch}\n{source}".encode()).hexdigest()
    path = cache_dir() / "cuda" / key
    try:
        return path.read_bytes()
    except OSError:
        data = _compile(source, arch)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(data)
        os.replace(file.name, path)
    except OSError:  # a cache that cannot be written is only slower
        return data
    return data


def _compile(source: str, arch: str) -> bytes:
    if _nvrtc_path():
        return _by_nvrtc(source, arch)
    if nvcc := shutil.which("nvcc"):
        return _by_nvcc(nvcc, source, arch)
    raise PockError(_MISSING)


@cache
def _version() -> str:
    """The compiler, for cache keys."""
    if path := _nvrtc_path():
        major, minor = ctypes.c_int(), ctypes.c_int()
        _nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        return f"nvrtc {major.value}.{minor.value} {path.stat().st_size}"
    if nvcc := shutil.which("nvcc"):
        return subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    raise PockError(_MISSING)


# --- NVRTC ---


@cache
def _nvrtc_path() -> Path | None:
    """libnvrtc of a pip package: nvidia/cuda_nvrtc (CUDA 12) or nvidia/cu13."""
    spec = importlib.util.find_spec("nvidia")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    found = [
        path for folder in folders for path in sorted(Path(folder).glob("*/lib/libnvrtc.so.[0-9]*"))
    ]
    return found[0] if found else None


@cache
def _nvrtc() -> ctypes.CDLL:
    path = _nvrtc_path()
    assert path is not None
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise PockError(f"cannot load NVRTC: {error}\n  Install it again: {_MISSING}") from error
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    return library


def _by_nvrtc(source: str, arch: str) -> bytes:
    library, program = _nvrtc(), ctypes.c_void_p()
    status = library.nvrtcCreateProgram(
        ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None
    )
    _check(status, "create")
    try:
        flags = [f"--gpu-architecture={arch}", "--std=c++17", "--device-as-default-execution-space"]
        words = (ctypes.c_char_p * len(flags))(*[f.encode() for f in flags])
        if library.nvrtcCompileProgram(program, len(flags), words):
            log = _get(program, "ProgramLog").decode(errors="replace")
            if "invalid value for --gpu-architecture" in log:
                raise PockError(f"{_version()} knows no '{arch}': install another NVRTC, or change "
                                "the target's 'cubins' and 'ptx'")  # fmt: skip
            raise InternalError(f"NVRTC refused generated code for {arch}:\n{log[:3000]}")
        ptx = arch.startswith("compute_")
        data = _get(program, "PTX").rstrip(b"\0") if ptx else _get(program, "CUBIN")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))
    return data


def _get(program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    library = _nvrtc()
    _check(getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)), what)
    buffer = ctypes.create_string_buffer(size.value)
    _check(getattr(library, f"nvrtcGet{what}")(program, buffer), what)
    return buffer.raw


def _check(status: int, what: str) -> None:
    if status:
        reason = _nvrtc().nvrtcGetErrorString(status).decode()
        raise InternalError(f"NVRTC ({what}): {reason}")


# --- nvcc ---


def _by_nvcc(nvcc: str, source: str, arch: str) -> bytes:
    form = "-ptx" if arch.startswith("compute_") else "-cubin"
    with tempfile.TemporaryDirectory(prefix="pocktvm-nvcc-") as folder:
        work = Path(folder)
        (work / "kernels.cu").write_text(source)
        command: Sequence[str] = [nvcc, form, "-w", f"-arch={arch}", "-std=c++17", "kernels.cu",
                                  "-o", "kernels.out"]  # fmt: skip
        done = subprocess.run(command, cwd=work, capture_output=True, text=True)
        if done.returncode:
            if "Unsupported gpu architecture" in done.stderr:
                raise PockError(f"{nvcc} knows no '{arch}': {done.stderr.strip()[:300]}")
            raise InternalError(f"nvcc refused generated code for {arch}:\n{done.stderr[:3000]}")
        return (work / "kernels.out").read_bytes()
