"""Decides whether a build would make what already lies there: one hash over everything it reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pocktvm.cli.crash import versions
from pocktvm.errors import PockError
from pocktvm.manifest import MANIFEST, damaged_files, read_manifest, read_stamp, sha256

_PACKAGE = Path(__file__).parent.parent
_SOURCES = ("*.py", "*.c", "*.h", "*.toml")


def fingerprint(options: Mapping[str, Any], files: Iterable[Path]) -> str:
    """Hash of the options, our own sources, the versions below us, and the user's files.

    A user's `model.py` may import its neighbours, so every .py beside it counts.
    """
    digest = hashlib.sha256(json.dumps([dict(options), versions()], default=str).encode())
    mine = [p for path in files for p in _with_neighbours(path)]
    for path in [*_own_sources(), *mine]:
        digest.update(str(path).encode())
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()


def is_current(folder: Path, key: str) -> bool:
    """True when `folder` was built from `key` and every file in it is intact."""
    stamp = read_stamp(folder)
    if stamp.get("key") != key:
        return False
    try:
        manifest = read_manifest(folder)
    except PockError:
        return False
    known = stamp.get("manifest") == sha256(folder / MANIFEST)
    return known and not damaged_files(folder, manifest)


def _with_neighbours(path: Path) -> list[Path]:
    return sorted(path.parent.glob("*.py")) if path.suffix == ".py" else [path]


def _own_sources() -> list[Path]:
    found = (p for pattern in _SOURCES for p in _PACKAGE.rglob(pattern))
    return sorted(p for p in found if "cli" not in p.relative_to(_PACKAGE).parts[:1])
