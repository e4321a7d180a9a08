"""Files of ours on the user's disk: written whole or not at all, refused before long work.

What a disk refuses (no folder, no right, no space) is a PockError that names the place.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from pocktvm.errors import PockError
from pocktvm.manifest import MANIFEST

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_file(path: Path, what: str) -> None:
    """PockError, saying `what`, where no file of this name can be written."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise PockError(f"no folder {folder} to write {path.name} ({what}) to: create it.")
    if path.is_dir():
        raise PockError(f"{path} is a folder; {what} is a file: name one.")
    try:
        with tempfile.TemporaryFile(dir=folder):
            return
    except OSError as error:
        raise _refused(what, path, error) from error


@contextlib.contextmanager
def replacing_file(path: Path, what: str) -> Iterator[Path]:
    """A name beside `path` to write to; it takes that place when the block succeeds."""
    part = path.with_name(path.name + ".part")
    try:
        yield part
        os.replace(part, path)
    except OSError as error:
        raise _refused(what, path, error) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def write_whole(path: Path, text: str, what: str) -> None:
    """Write a text file in one rename. PockError, saying `what`, where it cannot be."""
    with replacing_file(path, what) as part:
        part.write_text(text, encoding="utf-8")


def check_folder(out: Path) -> None:
    """PockError where no artifact can be written: a file, other files, no right to write."""
    out = out.absolute()
    if out.exists() and not out.is_dir():
        raise PockError(f"{out} is a file; -o names the artifact's folder")
    if out.is_dir() and any(out.iterdir()) and not (out / MANIFEST).is_file():
        raise PockError(f"{out} holds other files; name an empty or a new folder with -o")
    above = next(p for p in out.parents if p.exists())
    try:
        with tempfile.TemporaryDirectory(dir=above, prefix=f".{out.name}."):
            return
    except OSError as error:
        raise _refused("the artifact", out, error, " with -o") from error


@contextlib.contextmanager
def replacing_folder(out: Path) -> Iterator[Path]:
    """A fresh folder that takes the place of the artifact `out` when the block succeeds.

    Files of the user's own in an artifact folder (checkpoints) move to the new one. PockError: the
    place holds something else, cannot be written, or the disk is full.
    """
    out = out.absolute()
    check_folder(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise _refused("the artifact", out, error, " with -o") from error
    try:
        fresh.chmod(0o755)
        yield fresh
        _keep_foreign(out, fresh)
        _swap(fresh, out)
    except OSError as error:
        raise _refused("the artifact", out, error, " with -o") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _refused(what: str, path: Path, error: OSError, option: str = "") -> PockError:
    why = "the disk is full" if error.errno in _FULL else (error.strerror or str(error))
    first = "Free some space, or name" if error.errno in _FULL else "Name"
    return PockError(
        f"cannot write {what} to {path}: {why}; nothing was changed there.\n"
        f"  {first} another place{option}."
    )


def _keep_foreign(out: Path, fresh: Path) -> None:
    """Link what an older build did not write; the old folder stays whole until the swap."""
    if not out.is_dir():
        return
    try:
        ours = set(json.loads((out / MANIFEST).read_text())["files"]) | {MANIFEST}
    except (OSError, ValueError, KeyError, TypeError):
        ours = {MANIFEST}
    for path in out.iterdir():
        if path.name in ours or (fresh / path.name).exists() or not path.is_file():
            continue
        try:
            os.link(path, fresh / path.name)
        except OSError:
            shutil.copy2(path, fresh / path.name)


def _swap(fresh: Path, out: Path) -> None:
    old = fresh.with_name(fresh.name + ".old")
    if out.exists():
        out.rename(old)
    try:
        fresh.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def cache_dir() -> Path:
    """Where what can be made again is kept: $POCKTVM_CACHE, else ~/.cache/pocktvm (XDG_CACHE_HOME
    respected), else a folder of this user's among the temporary ones."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return _writable(Path(os.environ.get("POCKTVM_CACHE") or Path(base) / "pocktvm"))


@cache
def _writable(folder: Path) -> Path:
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    # a home that cannot be written, as in some containers
    folder = Path(tempfile.gettempdir()) / f"pocktvm-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PockError(f"{folder} is another user's: set POCKTVM_CACHE to a folder of yours.")
    return folder
