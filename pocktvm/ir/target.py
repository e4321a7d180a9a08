"""A device, read from a TOML in targets/ (data, not code)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Isa:
    """Facts the schedule rules read. Sizes in bytes, of one core (l3: shared)."""

    vector_bytes: int
    vector_registers: int
    l1_bytes: int
    l2_bytes: int
    cores: int
    l3_bytes: int = 0
    lane_fma: bool = False  # fmla vD, vN, vM.s[i]: multiply by one lane without a broadcast
    integer_vector_bytes: int = 0  # where integers have wider vectors than floats (0: they do not)

    @property
    def lanes(self) -> int:
        """float32 values in one vector."""
        return max(1, self.vector_bytes // 4)

    @property
    def integer_lanes(self) -> int:
        """int32 values in one vector of integers, which may also move floats as bits."""
        return max(self.lanes, self.integer_vector_bytes // 4)


@dataclass(frozen=True)
class Toolchain:
    """How zig links for the device."""

    zig_target: str
    zig_cpu: str = ""
    flags: tuple[str, ...] = ()
    library: str = "model.so"
    static_runner: bool = False  # pocktvm-run holds the model: a device that loads nothing
    own_loader: bool = False  # pocktvm-run is static and loads the library without the libc's help
    cubins: tuple[str, ...] = ()  # GPU: architectures the library holds machine code for
    ptx: str = ""  # GPU: virtual architecture of the code that the driver translates


@dataclass(frozen=True)
class Target:
    """One device.

    tvm                TVM's target, as JSON fields: kind, mcpu, …
    memory_bytes       what a model may take; `--budget` lowers it
    fast_memory_bytes  on-chip memory that the caller of the library gives (0: none)
    emulator           prefix of commands for it; empty: they run natively
    checked            how its artifacts are checked: run | emulated | simulated | inspected
    sources            fact -> where its number comes from
    """

    name: str
    description: str
    tvm: Mapping[str, Any]
    isa: Isa
    toolchain: Toolchain
    memory_bytes: int
    fast_memory_bytes: int = 0  # on-chip memory that the caller of the library gives (0: none)
    emulator: tuple[str, ...] = ()  # command prefix; empty: runs natively
    checked: str = "emulated"
    arch: str = ""
    os: str = "linux"
    sources: Mapping[str, str] = field(default_factory=dict)

    def within(self, limit: int | None) -> Target:
        """The device as a build with a budget sees it: rules that trade memory for speed ask how
        much there is."""
        if limit is None or limit >= self.memory_bytes:
            return self
        return replace(self, memory_bytes=limit)

    @property
    def is_gpu(self) -> bool:
        """True when kernels run on a GPU and the processor only launches them."""
        return self.tvm.get("kind") == "cuda"

    @property
    def is_host(self) -> bool:
        """True when artifacts run in this process, without an emulator."""
        return self.checked == "run"
