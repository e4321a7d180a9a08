"""Sets of linked names (union-find)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


class Components:
    """Names that were joined, directly or through others, share a root."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}

    def find(self, name: str) -> str:
        """The root of the name's component; a new name is its own."""
        root = name
        while (above := self._parent.setdefault(root, root)) != root:
            root = above
        while name != root:
            self._parent[name], name = root, self._parent[name]
        return root

    def join(self, names: Sequence[str]) -> None:
        """Put all of these into one component."""
        for name in names:
            self._parent[self.find(name)] = self.find(names[0])

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._parent))
