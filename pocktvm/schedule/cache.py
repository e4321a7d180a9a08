"""Compiled kernels on disk, keyed by everything that decides their code.

The key holds the signature, the rule and its knobs, the target, TVM's version and a digest of
the schedule sources, so that an edit of any rule misses instead of serving stale code.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from pocktvm.files import cache_dir

CACHE_VERSION = 1


@cache
def sources_digest() -> str:
    """A digest of every source file of the schedule room and of tvm_api.py."""
    package = Path(__file__).parent
    digest = hashlib.sha256()
    for path in (*sorted(package.rglob("*.py")), package.parent / "tvm_api.py"):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def key_of(*parts: Any) -> str:
    """A hexadecimal key of JSON-able parts."""
    text = json.dumps([CACHE_VERSION, sources_digest(), *parts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


class KernelCache:
    """Pairs (object bytes, facts) by key; safe for several builds at once."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or cache_dir() / "kernels"
        self.hits = self.misses = 0

    def get(self, key: str) -> tuple[bytes, dict[str, Any]] | None:
        """The stored pair, or None (a damaged entry counts as none)."""
        path = self.folder / f"{key}.o"
        try:
            facts = json.loads(path.with_suffix(".json").read_text())
            data = path.read_bytes()
        except (OSError, ValueError):
            data, facts = b"", {}
        if not data or len(data) != facts.get("nbytes"):
            self.misses += 1
            return None
        self.hits += 1
        return data, facts

    def put(self, key: str, data: bytes, facts: dict[str, Any]) -> None:
        """Store a pair; a cache that cannot be written (full disk, read-only) is only slower."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _replace(self.folder / f"{key}.o", data)
            _replace(
                self.folder / f"{key}.json", json.dumps({**facts, "nbytes": len(data)}).encode()
            )
        except OSError:
            return


def _replace(path: Path, data: bytes) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".tmp")
    with os.fdopen(handle, "wb") as file:
        file.write(data)
    os.replace(name, path)
