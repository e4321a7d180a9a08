"""Runs CUDA C without a GPU: the kernels compiled for a processor, each launch replayed in C.

tests/cuda/replay.cpp runs a block's threads as fibres that meet at barriers. zig compiles both, for
this machine or for another one.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pocktvm.ir.kernels import Launch

FOLDER = Path(__file__).parent / "cuda"
ENTRY = re.compile(r"__global__ void (?:__launch_bounds__\(\d+\) )?(\w+)\((.*?)\) \{")
FLAGS = ("-std=c++17", "-O2", "-fno-exceptions", "-fno-rtti", "-fno-sanitize=all", "-fPIC",
         "-ffp-contract=off", "-fvisibility=hidden", "-w")  # fmt: skip


def table_of(source: str) -> str:
    """The C++ file: kernels, and the table that finds them by name."""
    source = source.replace("__shared__ alignas(64)", "alignas(64) static")
    assert "__shared__" not in source
    rows = [
        f'  {{"{name}", (void *)&{name}, {args.count("*")}}},'
        for name, args in ENTRY.findall(source)
    ]
    return "\n".join([
        '#include "replay.h"', source,
        'extern "C" const replay_kernel replay_kernels[] = {', *rows, "  {0, 0, 0}", "};\n",
    ])  # fmt: skip


def compile_replay(
    source: str, output: Path, *, target: Sequence[str] = (), more: Sequence[str | Path] = ()
) -> Path:
    """A shared library that replays the kernels of `source`."""
    file = output.with_name("kernels.cpp")
    file.write_text(table_of(source))
    command = [sys.executable, "-m", "ziglang", "cc", *target, *FLAGS, "-shared", f"-I{FOLDER}",
               file, FOLDER / "replay.cpp", *more, "-o", output]  # fmt: skip
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return output


class Replay:
    """The kernels of one source file, launched on numpy arrays."""

    def __init__(self, source: str, folder: Path) -> None:
        self.library = ctypes.CDLL(str(compile_replay(source, folder / "replay.so")))
        self.library.replay_launch.restype = ctypes.c_char_p

    def launch(
        self, launch: Launch, arrays: Sequence[np.ndarray], *, backwards: bool = False
    ) -> None:
        """Start one function; `arrays` are the kernel's arguments; threads in either order."""
        self.library.replay_backwards(int(backwards))
        extents = [(ctypes.c_uint * 3)(*e) for e in (launch.grid, launch.block)]
        pointers = (ctypes.c_void_p * 32)(*[arrays[i].ctypes.data for i in launch.args])
        error = self.library.replay_launch(launch.entry.encode(), *extents, pointers)
        assert error is None, error.decode()


def launches_of(entries: Sequence[dict]) -> list[Launch]:
    """Launches as they are kept beside a kernel's source."""
    return [
        Launch(e["entry"], tuple(e["args"]), tuple(e["grid"]), tuple(e["block"])) for e in entries
    ]


def build_driver(source: Path, folder: Path, target: Sequence[str] = ()) -> Path:
    """A folder with a libcuda.so.1 that replays the kernels of a model's `kernels.cu`."""
    folder.mkdir(parents=True, exist_ok=True)
    more = [FOLDER / "driver.cpp", "-Wl,-soname,libcuda.so.1"]
    compile_replay(source.read_text(), folder / "libcuda.so.1", target=target, more=more)
    return folder
