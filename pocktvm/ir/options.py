"""`name:option=value,…`, the spelling losses and optimizers share on the command line."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from typing import Any

from pocktvm.errors import PockError

_COMMA = re.compile(r",(?![^\[]*\])")  # not inside brackets


def parse_options(
    text: str, kind: str, defaults: Mapping[str, Mapping[str, Any]]
) -> tuple[str, dict[str, Any]]:
    """The name and its options over their defaults.

    `defaults` maps every name there is to its options. Raises PockError for an unknown name or
    option, and for a value of another type than the default's.
    """
    if not isinstance(text, str):
        what = text.__name__ if isinstance(text, type) else type(text).__name__
        raise PockError(
            f"{what} is no {kind} of pocktvm's: give its name as text, with options after a "
            f"colon.\n  There are: {_list(defaults)}."
        )
    name, _, rest = text.strip().partition(":")
    if name not in defaults:
        raise PockError(
            f"no {kind} '{name}'{_nearest(name, defaults)}; there are: {_list(defaults)}."
        )
    known = defaults[name]
    options = dict(known)
    for item in _COMMA.split(rest) if rest else []:
        key, equals, value = (part.strip() for part in item.partition("="))
        if key not in known:
            there = f"it has: {_list(known)}" if known else "it has none"
            raise PockError(f"{kind} '{name}' has no option '{key}'; {there}.")
        if not equals:
            raise PockError(f"option '{key}' of {kind} '{name}' has no value; write {key}=….")
        options[key] = _typed(value, known[key], f"option '{key}' of {kind} '{name}'")
    return name, options


def _typed(text: str, default: Any, where: str) -> Any:
    """A value like the default: bool, int, float, string; None takes a number or a list."""
    if isinstance(default, str):
        return text.strip("'\"")
    try:
        value = json.loads(text.lower() if text.lower() in ("true", "false") else text)
    except ValueError:
        value = None
    good = {
        bool: lambda v: isinstance(v, bool) or v in (0, 1),
        int: lambda v: isinstance(v, int) and not isinstance(v, bool),
        float: lambda v: isinstance(v, int | float) and not isinstance(v, bool),
        type(None): _number_or_list,
    }[type(default)]
    if value is None or not good(value):
        names = {bool: "true or false", int: "a whole number", float: "a number"}
        wanted = names.get(type(default), "a number or a list of numbers")
        raise PockError(f"{where} wants {wanted}, not '{text}'.")
    return type(default)(value) if default is not None else value


def _number_or_list(value: Any) -> bool:
    items = value if isinstance(value, list) else [value]
    return all(isinstance(v, int | float) and not isinstance(v, bool) for v in items)


def _nearest(name: str, names: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, list(names), 1)
    return f" (did you mean '{near[0]}'?)" if near else ""


def _list(names: Mapping[str, Any]) -> str:
    return ", ".join(names)
