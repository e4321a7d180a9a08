"""Sizes as people write them: MB is 10**6 bytes, MiB is 2**20."""

from __future__ import annotations

import re

_UNITS = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30,
}  # fmt: skip
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(text: str) -> int:
    """`64MB`, `1.5 GiB`, `4096` -> bytes; ValueError says what is allowed."""
    match = _SIZE.fullmatch(text)
    unit = _UNITS.get(match[2].upper()) if match else None
    size = int(float(match[1]) * unit) if match and unit else 0
    if size <= 0:
        raise ValueError(f"'{text}' is no size: write 64MB (10^6), 64MiB (2^20), 4GB, or bytes")
    return size


def format_bytes(nbytes: int) -> str:
    """`12.3 MB`: decimal units, three figures."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= factor:
            return f"{nbytes / factor:.{1 if nbytes >= 10 * factor else 2}f} {unit}"
    return f"{nbytes} B"


def parse_seconds(text: str) -> float:
    """`1s`, `500ms`, `2m`, `0.5` -> seconds; ValueError says what is allowed."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(ms|s|m|min|h)?\s*", text)
    if not match or float(match[1]) <= 0:
        raise ValueError(f"'{text}' is no duration: write 1s, 500ms, 2m")
    factors = {"ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
    return float(match[1]) * factors[match[2] or "s"]
