"""Makes a kernel object's symbols private to the library they are linked into.

ELF has version scripts for this; zig's Mach-O linker ignores lists of exports without a word, so
the symbols are marked before it sees them.
"""

from __future__ import annotations

import struct

_MAGIC, _SYMTAB = 0xFEEDFACF, 0x2
_TYPE, _EXTERNAL, _PRIVATE = 0x0E, 0x01, 0x10  # <mach-o/nlist.h>


def hide_symbols(data: bytes) -> bytes:
    """A 64-bit Mach-O object whose defined symbols no other library can see."""
    out = bytearray(data)
    magic, _, _, _, count = struct.unpack_from("<5I", out, 0)
    if magic != _MAGIC:
        raise ValueError("no 64-bit Mach-O object")
    at = 32
    for _ in range(count):
        command, size = struct.unpack_from("<2I", out, at)
        if command == _SYMTAB:
            offset, symbols = struct.unpack_from("<2I", out, at + 8)
            for kind in range(offset + 4, offset + 4 + 16 * symbols, 16):
                if out[kind] & _EXTERNAL and out[kind] & _TYPE:
                    out[kind] |= _PRIVATE
        at += size
    return bytes(out)
