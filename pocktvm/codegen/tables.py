"""C initialisers from Python values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

# How TVM and DLPack write a dtype: code, bits.
_DLTYPES = {
    "float32": (2, 32), "float16": (2, 16), "int32": (0, 32), "int64": (0, 64), "int8": (0, 8),
    "uint8": (1, 8), "uint16": (1, 16), "uint32": (1, 32), "bool": (6, 8),
}  # fmt: skip


def text(value: str) -> str:
    """A C string literal; bytes outside of plain ASCII are written in octal."""
    out = []
    for byte in value.encode():
        char = chr(byte)
        plain = 32 <= byte < 127 and char not in '"\\?'
        out.append(char if plain else f"\\{byte:03o}")
    return '"' + "".join(out) + '"'


def number(value: float) -> str:
    """A C double, exactly: in hexadecimal."""
    return float(value).hex()


def dltype(dtype: str) -> str:
    """The initialiser of a pk_dltype."""
    code, bits = _DLTYPES[dtype]
    return f"{{{code}, {bits}, 1}}"


def struct(fields: Mapping[str, object]) -> str:
    """A C initialiser that names its fields."""
    return "{" + ", ".join(f".{name} = {value}" for name, value in fields.items()) + "}"


def array(kind: str, name: str, items: Iterable[object]) -> str:
    """A static table; C has no empty ones, so an empty one gets a zero."""
    lines = [f"  {item}," for item in items] or ["  0," if "*" in kind else "  {0},"]
    if not any("{" in line for line in lines):
        lines = _filled([line.strip() for line in lines])
    return f"static const {kind} {name}[] = {{\n" + "\n".join(lines) + "\n};\n"


def _filled(words: Sequence[str], width: int = 96) -> list[str]:
    """Short items side by side."""
    lines, line = [], " "
    for word in words:
        if len(line) + 1 + len(word) > width:
            lines.append(line)
            line = " "
        line += " " + word
    return [*lines, line]


class Shapes:
    """One pool of int64 rows that tensors share."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._items: list[int] = []
        self._places: dict[tuple[int, ...], int] = {}

    def add(self, row: Sequence[int]) -> str:
        """An expression that points at the row."""
        key = tuple(int(i) for i in row)
        if key not in self._places:
            self._places[key] = len(self._items)
            self._items += key or (0,)
        return f"{self.name} + {self._places[key]}"

    def declaration(self) -> str:
        """The table itself; emit it before its first use."""
        return array("int64_t", self.name, [str(i) for i in self._items] or ["0"])
