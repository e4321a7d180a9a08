"""Tables that functions enter by a decorator: gradients, converters, lowerings, references."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from pocktvm.errors import InternalError

Entry = TypeVar("Entry")


def entry(table: dict[str, Entry], *names: str) -> Callable[[Entry], Entry]:
    """A decorator that enters what it decorates into `table` under `names`.

    Raises InternalError for a name that is taken: the second function would silently win.
    """

    def register(item: Entry) -> Entry:
        taken = [name for name in names if name in table]
        if taken:
            raise InternalError(f"registered twice: {', '.join(taken)}")
        table.update(dict.fromkeys(names, item))
        return item

    return register
