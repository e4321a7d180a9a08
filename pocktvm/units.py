"""Bytes as people write them: MB is 10^6 bytes, MiB 2^20."""

from __future__ import annotations

import re

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
}


def parse_bytes(text: str) -> int:
    """`64MB`, `1.5 GiB`, `4096` -> bytes. Raises ValueError for anything else, zero included."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text, re.IGNORECASE)
    unit = _UNITS.get(match[2].lower()) if match else None
    nbytes = int(float(match[1]) * unit) if match and unit else 0
    if nbytes <= 0:
        raise ValueError(f"'{text}' is no amount of memory; write 64MB, 64MiB or 1.5GB")
    return nbytes


def format_bytes(nbytes: float) -> str:
    """Bytes for people, in units of 1000: `342 MB`, `15.4 MB`, `812 kB`."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(nbytes) >= size:
            value = nbytes / size
            return f"{value:.3g} {unit}" if abs(value) < 100 else f"{value:.0f} {unit}"
    return f"{nbytes:.0f} B"
