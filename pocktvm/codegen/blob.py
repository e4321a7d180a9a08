"""Bytes that go into the library as they are, and where each array lies among them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from pocktvm.ir.kernels import ALIGN


class Blob:
    """A file of arrays, each aligned for the kernels; equal bytes are kept once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.nbytes = 0
        self._places: dict[bytes, int] = {}
        path.write_bytes(b"")

    def add(self, array: np.ndarray) -> int:
        """Append an array; its offset."""
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        key = hashlib.sha256(data.data).digest() + len(data).to_bytes(8, "little")
        if key not in self._places:
            self._places[key] = self.nbytes
            with self.path.open("ab") as file:
                file.write(data.data)
                file.write(bytes(-len(data) % ALIGN))
            self.nbytes += len(data) + -len(data) % ALIGN
        return self._places[key]


def assembly(symbols: dict[str, Path], *, mach_o: bool) -> str:
    """An assembly file that embeds each file read-only, page-aligned, under its symbol."""
    prefix = "_" if mach_o else ""
    section = "__TEXT,__const" if mach_o else '.rodata.pocktvm,"a",%progbits'
    hide = ".private_extern" if mach_o else ".hidden"
    lines = [f"  .section {section}"]
    for symbol, path in symbols.items():
        name = prefix + symbol
        quoted = str(path).replace("\\", "\\\\").replace('"', '\\"')
        lines += ["  .p2align 12", f"  .globl {name}", f"  {hide} {name}", f"{name}:"]
        lines += [f'  .incbin "{quoted}"', "  .byte 0"]
    if not mach_o:
        lines.append('  .section .note.GNU-stack,"",%progbits')
    return "\n".join(lines) + "\n"
