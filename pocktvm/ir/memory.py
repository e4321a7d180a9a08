"""The memory plan: one arena, an offset for every buffer, checked by memory/verify.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

CLASSES = ("frozen", "trained", "optimizer", "activations", "gradients", "workspace")


@dataclass(frozen=True)
class MemoryPlan:
    """Offsets in bytes from the arena's start, for roots only (see Program.root).

    persistent_bytes  trained tensors, optimizer state and scalars sit in [0, persistent_bytes)
    offsets           {"step": {buffer: offset}, "predict": {...}}; persistent buffers have the
                      same offset in both
    lower_bound_bytes largest sum of live bytes over time, in the chosen order
    total_bytes       arena + frozen weights + code
    by_class          bytes per class of memory (transient classes: at the peak)
    peak_call         label of the call at which the peak is reached
    fast_bytes        the arena's last bytes that are to lie in the device's fast memory
    """

    arena_bytes: int
    persistent_bytes: int
    lower_bound_bytes: int
    total_bytes: int
    offsets: Mapping[str, Mapping[str, int]]
    by_class: Mapping[str, int]
    peak_call: str = ""
    fast_bytes: int = 0

    def __str__(self) -> str:
        lines = [
            f"arena {self.arena_bytes} bytes, lower bound {self.lower_bound_bytes} "
            f"(at '{self.peak_call}'), total {self.total_bytes}, fast {self.fast_bytes}",
            "  " + ", ".join(f"{name} {nbytes}" for name, nbytes in self.by_class.items()),
        ]
        for program, offsets in self.offsets.items():
            lines.append(f"{program}, persistent up to {self.persistent_bytes}")
            lines += [f"  {at:>12} {name}" for name, at in sorted(offsets.items(), key=_place)]
        return "\n".join(lines)


def _place(item: tuple[str, int]) -> tuple[int, str]:
    return item[1], item[0]
