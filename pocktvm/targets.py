"""Reads a device from its TOML: `targets/<name>.toml`, or a file of the user's own.

The folder at the top of the repository is the source; `pocktvm/_targets` links to it, so that a
checkout reads the same files a wheel carries. A file says exactly the fields of ir/target.py: an
unknown or a missing one is refused with the names that are allowed. Sizes may be written `32KiB`.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pocktvm.errors import PockError
from pocktvm.ir.target import Isa, Target, Toolchain
from pocktvm.units import parse_bytes

FOLDER = Path(__file__).parent / "_targets"
MAY_BE_ZERO = ("l3_bytes", "fast_memory_bytes")  # a device without it
CHECKED = ("run", "emulated", "simulated", "inspected")


def list_targets() -> list[Target]:
    """Every target that ships, the host first, then by name."""
    names = sorted((p.stem for p in FOLDER.glob("*.toml")), key=lambda n: (n != "host", n))
    return [load_target(name) for name in names]


def load_target(name_or_path: str | Path) -> Target:
    """The target of this name, or of this `.toml` file. PockError: unknown name, bad file."""
    text = str(name_or_path)
    path = Path(text) if text.endswith(".toml") else FOLDER / f"{text}.toml"
    known = sorted(p.stem for p in FOLDER.glob("*.toml"))
    if not text.endswith(".toml") and text not in known:
        near = difflib.get_close_matches(text, known, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else "."
        raise PockError(
            f"no target '{text}'{hint} There are: {', '.join(known)}.\n"
            "  `pocktvm targets` describes them; --target FILE.toml takes a file of your own."
        )
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise PockError(
            f"cannot read the target file {path}: {why}.\n"
            "  `pocktvm targets` lists those there are."
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise PockError(f"{path} is no TOML: {error}") from error
    return read_target(raw, name=path.stem, where=str(path))


def read_target(raw: Mapping[str, Any], *, name: str, where: str) -> Target:
    """A Target from a TOML's tables. PockError says which field is unknown, missing or wrong."""
    fields = dict(raw)
    if fields.pop("detect", False):
        from pocktvm.host import detect_host

        found = detect_host()
        merged = {k: {**v, **fields[k]} if isinstance(v, dict) else fields[k]
                  for k, v in found.items() if k in fields}  # fmt: skip
        fields = {**found, **fields, **merged}
    fields["isa"] = _read(Isa, fields.get("isa", {}), f"{where} [isa]")
    fields["toolchain"] = _read(Toolchain, fields.get("toolchain", {}), f"{where} [toolchain]")
    target = typing.cast(Target, _read(Target, {"name": name, **fields}, where))
    if target.checked not in CHECKED:
        raise PockError(f"{where}: checked = '{target.checked}'; allowed: {', '.join(CHECKED)}")
    if "kind" not in target.tvm:
        raise PockError(f"{where} [tvm]: missing 'kind' (llvm, cuda or metal)")
    if target.is_gpu and target.fast_memory_bytes:
        raise PockError(f"{where}: fast_memory_bytes: a GPU's arena lies in one memory")
    return target


def _read(kind: type, raw: Any, where: str) -> Any:
    """One dataclass from one table, every field checked by its annotation."""
    if not isinstance(raw, Mapping):
        raise PockError(f"{where} is a table of fields, not {raw!r}")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    unknown = [key for key in raw if key not in fields]
    if unknown:
        allowed = ", ".join(f for f in fields if f != "name")
        raise PockError(f"{where}: unknown field '{unknown[0]}'\n  allowed: {allowed}")
    required = [
        f.name
        for f in fields.values()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in required if name not in raw]
    if missing:
        raise PockError(f"{where}: missing {', '.join(repr(m) for m in missing)}")
    hints = typing.get_type_hints(kind)
    return kind(**{k: _value(hints[k], v, k, where) for k, v in raw.items()})


def _value(hint: Any, value: Any, key: str, where: str) -> Any:
    """`value` as the annotation wants it: sizes from text, lists as tuples."""
    if hint is int and key.endswith("_bytes") and isinstance(value, str):
        try:
            return parse_bytes(value)
        except ValueError as error:
            raise PockError(f"{where}: {key}: {error}") from error
    if typing.get_origin(hint) is tuple:
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
    elif typing.get_origin(hint) is not None:
        if isinstance(value, Mapping):
            return dict(value)
    elif isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        if hint is not int or value > 0 or (value == 0 and key in MAY_BE_ZERO):
            return value
        raise PockError(f"{where}: {key} = {value} must be positive")
    wanted = getattr(hint, "__name__", str(hint))
    raise PockError(f"{where}: {key} = {value!r} is no {wanted}")
