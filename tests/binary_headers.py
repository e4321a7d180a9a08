"""Reads what a loader would: headers, exports and imports of ELF and Mach-O files.

Written for the tests and apart from the linker, so that an artifact nobody can run here (macOS) is
still looked at by something that did not make it.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ELF_MACHINES = {40: "arm", 62: "x86_64", 164: "hexagon", 183: "aarch64"}
# LC_SEGMENT_64, LC_LOAD_DYLIB, …: <mach-o/loader.h>
SYMTAB, LOAD_DYLIB, ID_DYLIB, SEGMENT, CODE_SIGNATURE, BUILD_VERSION = 2, 0xC, 0xD, 0x19, 0x1D, 0x32
DYLD_INFO, EXPORTS_TRIE = 0x80000022, 0x80000033


@dataclass
class Binary:
    """One executable or library."""

    format: str  # elf | mach-o
    machine: str
    bits: int
    library: bool
    needed: list[str] = field(default_factory=list)
    exports: set[str] = field(default_factory=set)
    imports: set[str] = field(default_factory=set)
    versions: set[str] = field(default_factory=set)  # GLIBC_2.4, …
    flags: int = 0
    writable_code: bool = False
    hard_float: bool = False
    soname: str = ""
    # Mach-O
    minimum_os: tuple[int, int] = (0, 0)
    signed_pages: int = 0


def read_binary(path: Path) -> Binary:
    """The facts of a file; ValueError where it is neither ELF nor Mach-O."""
    data = path.read_bytes()
    if data[:4] == b"\x7fELF":
        return _read_elf(data)
    if data[:4] == b"\xcf\xfa\xed\xfe":
        return _read_mach_o(data)
    raise ValueError(f"{path} starts with {data[:4]!r}")


def _text(data: bytes, start: int) -> str:
    return data[start : data.index(b"\0", start)].decode()


# --- ELF ---


def _read_elf(data: bytes) -> Binary:
    wide = data[4] == 2
    kind, machine = struct.unpack_from("<HH", data, 16)
    layout = "<QQQIHHHHHH" if wide else "<IIIIHHHHHH"
    _, phoff, _, flags, _, phsize, phnum, *_ = struct.unpack_from(layout, data, 24)
    found = Binary("elf", ELF_MACHINES[machine], 64 if wide else 32, kind == 3, flags=flags)
    found.hard_float = machine != 40 or bool(flags & 0x400)
    segments = []
    for i in range(phnum):
        at = phoff + i * phsize
        if wide:
            tag, access, offset, address, _, size, *_ = struct.unpack_from("<IIQQQQQQ", data, at)
        else:
            tag, offset, address, _, size, _, access, _ = struct.unpack_from("<8I", data, at)
        segments.append((tag, offset, address, size, access))
    found.writable_code = any(t == 1 and a & 3 == 3 for t, *_, a in segments)
    dynamic = [(offset, size) for tag, offset, _, size, _ in segments if tag == 2]
    if dynamic:
        _read_dynamic(data, found, segments, *dynamic[0])
    return found


def _read_dynamic(data: bytes, found: Binary, segments: list, offset: int, size: int) -> None:
    def place(address: int) -> int:
        for tag, start, base, length, _ in segments:
            if tag == 1 and base <= address < base + length:
                return start + address - base
        raise ValueError(f"address {address:#x} is in no segment")

    pair = "<qQ" if found.bits == 64 else "<iI"
    entries: list[tuple[int, int]] = []
    for at in range(offset, offset + size, struct.calcsize(pair)):
        entries.append(struct.unpack_from(pair, data, at))
        if entries[-1][0] == 0:
            break
    table = dict(entries)
    strings = place(table[5])
    found.needed = [_text(data, strings + value) for tag, value in entries if tag == 1]
    found.soname = _text(data, strings + table[14]) if 14 in table else ""
    symbols, entry = place(table[6]), table[11]
    # the string table follows the symbols in what lld writes only by habit: count by hash table
    count = _symbol_count(data, table, place)
    for i in range(1, count):
        at = symbols + i * entry
        if found.bits == 64:
            name, info, _, section = struct.unpack_from("<IBBH", data, at)
        else:
            name, _, _, info, _, section = struct.unpack_from("<IIIBBH", data, at)
        if info >> 4 == 0:  # local
            continue
        (found.exports if section else found.imports).add(_text(data, strings + name))
    if 0x6FFFFFFE in table:
        found.versions = _versions(data, place(table[0x6FFFFFFE]), strings)


def _symbol_count(data: bytes, table: dict[int, int], place) -> int:
    if 4 in table:  # DT_HASH: as many chains as symbols
        return struct.unpack_from("<II", data, place(table[4]))[1]
    at = place(table[0x6FFFFEF5])  # DT_GNU_HASH: the last chain's end
    buckets, first, bloom, _ = struct.unpack_from("<IIII", data, at)
    at += 16 + bloom * (8 if data[4] == 2 else 4)
    last = max(struct.unpack_from(f"<{buckets}I", data, at), default=0)
    if last < first:
        return first
    while not struct.unpack_from("<I", data, at + 4 * (buckets + last - first))[0] & 1:
        last += 1
    return last + 1


def _versions(data: bytes, at: int, strings: int) -> set[str]:
    """Names of the symbol versions a file wants of others (DT_VERNEED)."""
    names = set()
    while True:
        _, count, _, aux, step = struct.unpack_from("<HHIII", data, at)
        entry = at + aux
        for _ in range(count):
            _, _, _, name, following = struct.unpack_from("<IHHII", data, entry)
            names.add(_text(data, strings + name))
            entry += following
        if not step:
            return names
        at += step


# --- Mach-O ---


def _read_mach_o(data: bytes) -> Binary:
    _, cpu, _, kind, count, _, flags, _ = struct.unpack_from("<8I", data, 0)
    machine = {0x0100000C: "aarch64", 0x01000007: "x86_64"}[cpu]
    found = Binary("mach-o", machine, 64, kind == 6, flags=flags)
    at = 32
    for _ in range(count):
        command, size = struct.unpack_from("<II", data, at)
        if command in (LOAD_DYLIB, ID_DYLIB):
            name = _text(data, at + struct.unpack_from("<I", data, at + 8)[0])
            if command == ID_DYLIB:
                found.soname = name
            else:
                found.needed.append(name)
        elif command == SYMTAB:
            _read_symbols(data, found, *struct.unpack_from("<4I", data, at + 8))
        elif command == DYLD_INFO:
            start, length = struct.unpack_from("<2I", data, at + 40)
            found.exports = set(_walk(data[start : start + length], 0, ""))
        elif command == EXPORTS_TRIE:
            start, length = struct.unpack_from("<2I", data, at + 8)
            found.exports = set(_walk(data[start : start + length], 0, ""))
        elif command == SEGMENT:
            access = struct.unpack_from("<I", data, at + 60)[0]
            found.writable_code |= access & 6 == 6
        elif command == BUILD_VERSION:
            version = struct.unpack_from("<I", data, at + 12)[0]
            found.minimum_os = (version >> 16, version >> 8 & 0xFF)
        elif command == CODE_SIGNATURE:
            offset, length = struct.unpack_from("<II", data, at + 8)
            found.signed_pages = check_signature(data, data[offset : offset + length])
        at += size
    return found


def _read_symbols(
    data: bytes, found: Binary, offset: int, count: int, strings: int, _: int
) -> None:
    for i in range(count):
        name, kind, _, _, _ = struct.unpack_from("<IBBHQ", data, offset + 16 * i)
        if kind & 0xFF == 1:  # external and undefined
            found.imports.add(_text(data, strings + name))


def _number(data: bytes, at: int) -> tuple[int, int]:
    """An unsigned LEB128 and where it ends."""
    value = shift = 0
    while True:
        value |= (data[at] & 0x7F) << shift
        shift += 7
        at += 1
        if not data[at - 1] & 0x80:
            return value, at


def _walk(trie: bytes, at: int, prefix: str) -> Iterator[str]:
    """The names in an export trie."""
    if not trie:
        return
    size, at = _number(trie, at)
    if size:
        yield prefix
    at += size
    children, at = trie[at], at + 1
    for _ in range(children):
        part = _text(trie, at)
        child, at = _number(trie, at + len(part) + 1)
        yield from _walk(trie, child, prefix + part)


def check_signature(data: bytes, signature: bytes) -> int:
    """Pages whose hash in an ad-hoc signature is right; ValueError for the first that is wrong.

    macOS on Apple silicon kills a process that maps an unsigned or a changed page."""
    magic, _, count = struct.unpack_from(">III", signature, 0)
    if magic != 0xFADE0CC0:
        raise ValueError("no embedded signature")
    blobs = dict(struct.unpack_from(">II", signature, 12 + 8 * i) for i in range(count))
    directory = signature[blobs[0] :]
    magic, _, _, flags, hashes, _, _, pages, limit = struct.unpack_from(">9I", directory, 0)
    size, kind, _, page = struct.unpack_from(">4B", directory, 36)
    if magic != 0xFADE0C02 or not flags & 2 or (size, kind) != (32, 2):
        raise ValueError(f"no ad-hoc SHA-256 code directory (flags {flags:#x})")
    for i in range(pages):
        start = i << page
        digest = hashlib.sha256(data[start : min(start + (1 << page), limit)]).digest()
        if directory[hashes + 32 * i : hashes + 32 * (i + 1)] != digest:
            raise ValueError(f"page {i} is not what was signed")
    return pages
