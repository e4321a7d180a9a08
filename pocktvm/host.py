"""Facts of the machine that builds, read from /proc and /sys without importing TVM.

The CPU name is the newest one whose every instruction set that LLVM may pick by itself is present
here: a virtual machine that hides a feature gets an older name, not an illegal instruction.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from pocktvm.errors import PockError

_V3 = "avx avx2 bmi1 bmi2 f16c fma abm movbe xsave"
_ZEN1 = f"{_V3} adx sha_ni sse4a clflushopt aes pclmulqdq rdrand rdseed"
_ZEN3 = f"{_ZEN1} clwb vaes vpclmulqdq rdpid"
_AVX512 = f"{_V3} avx512f avx512bw avx512cd avx512dq avx512vl"
_ICE = f"{_AVX512} adx avx512ifma avx512vbmi avx512_vbmi2 avx512_vnni avx512_bitalg"
_ICE += " avx512_vpopcntdq gfni vaes vpclmulqdq sha_ni clflushopt clwb rdpid aes"
_ZEN4 = f"{_ZEN3} {_ICE} avx512_bf16"

# (vendor or "", LLVM's name, flags of /proc/cpuinfo it needs), best first.
_X86 = (
    ("AuthenticAMD", "znver5", f"{_ZEN4} avx_vnni avx512_vp2intersect movdiri"),
    ("AuthenticAMD", "znver4", _ZEN4),
    ("AuthenticAMD", "znver3", _ZEN3),
    ("AuthenticAMD", "znver2", f"{_ZEN1} clwb rdpid"),
    ("AuthenticAMD", "znver1", _ZEN1),
    ("GenuineIntel", "sapphirerapids", f"{_ICE} avx512_fp16 avx512_bf16 avx_vnni movdiri amx_tile"),
    ("GenuineIntel", "icelake-server", _ICE),
    ("GenuineIntel", "cascadelake", f"{_AVX512} adx avx512_vnni clflushopt clwb aes"),
    ("GenuineIntel", "skylake-avx512", f"{_AVX512} adx clflushopt clwb aes"),
    ("GenuineIntel", "haswell", f"{_V3} aes pclmulqdq rdrand"),
    ("", "x86-64-v4", _AVX512),
    ("", "x86-64-v3", _V3),
    ("", "x86-64-v2", "sse4_1 sse4_2 ssse3 popcnt cx16"),
    ("", "x86-64", ""),
)
# "CPU part" of /proc/cpuinfo where the implementer is Arm (0x41).
_ARM_PARTS = {
    "0xd03": "cortex-a53", "0xd08": "cortex-a72", "0xd0b": "cortex-a76", "0xd0c": "neoverse-n1",
    "0xd40": "neoverse-v1", "0xd49": "neoverse-n2", "0xd4f": "neoverse-v2",
}  # fmt: skip


def detect_host() -> dict[str, Any]:
    """The host target's fields, as a TOML would give them. PockError where nothing is known."""
    machine = platform.machine()
    if platform.system() != "Linux" or machine not in ("x86_64", "aarch64"):
        raise PockError(
            f"the host target is detected on Linux x86_64 and aarch64; this is "
            f"{platform.system()} {machine}.\n"
            "  Write a target file (copy targets/rpi4.toml) and pass --target FILE.toml."
        )
    info = _cpuinfo()
    cpu = x86_cpu(info.get("vendor_id", ""), set(info.get("flags", "").split()))
    if machine == "aarch64":
        cpu = _ARM_PARTS.get(info.get("CPU part", ""), "generic")
    cores = count_cores()
    return {
        "arch": machine,
        "memory_bytes": _memory_bytes(),
        "tvm": {"kind": "llvm", "mcpu": cpu, "num-cores": cores},
        "isa": {**_vectors(machine, info.get("flags", "").split()), **_caches(), "cores": cores},
        "toolchain": {
            "zig_target": f"{machine}-linux-gnu.2.28",
            "zig_cpu": cpu.replace("-", "_"),
        },
    }


def x86_cpu(vendor: str, flags: set[str]) -> str:
    """LLVM's name of an x86 CPU from its vendor and its flags in /proc/cpuinfo."""
    for maker, name, needed in _X86:
        if maker in ("", vendor) and flags.issuperset(needed.split()):
            return name
    return "x86-64"


def count_cores() -> int:
    """Cores this process may use: its affinity, and a container's quota where there is one."""
    cores = len(os.sched_getaffinity(0))
    quota = _read("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0] != "max":
        cores = min(cores, max(1, round(int(quota[0]) / int(quota[1]))))
    return cores


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _cpuinfo() -> dict[str, str]:
    """The first processor's lines of /proc/cpuinfo."""
    first = _read("/proc/cpuinfo").split("\n\n")[0]
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _vectors(machine: str, flags: list[str]) -> dict[str, Any]:
    if machine == "aarch64":
        return {"vector_bytes": 16, "vector_registers": 32, "lane_fma": True}
    if "avx512f" in flags and "avx512vl" in flags:
        return {"vector_bytes": 64, "vector_registers": 32}
    return {"vector_bytes": 32 if "avx2" in flags else 16, "vector_registers": 16}


def _caches() -> dict[str, int]:
    """L1 data, L2 and L3 of core 0; virtual machines that hide them get modest sizes."""
    found = {"l1_bytes": 32 << 10, "l2_bytes": 512 << 10}
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        level, size = _read(index / "level"), _read(index / "size")
        if _read(index / "type") != "Instruction" and size.endswith("K") and level in "123":
            found[f"l{level}_bytes"] = int(size[:-1]) << 10
    return found


def _memory_bytes() -> int:
    """Physical memory, or a container's limit where it is lower."""
    lines = dict(line.split(":", 1) for line in _read("/proc/meminfo").splitlines())
    total = int(lines.get("MemTotal", "4194304 kB").split()[0]) << 10
    limit = _read("/sys/fs/cgroup/memory.max")
    return min(total, int(limit)) if limit.isdigit() else total
