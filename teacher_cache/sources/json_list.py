"""Splits one huge JSON list into its elements without holding the list: byte offset and bytes of each.

Works on bytes: in UTF-8 no byte of a longer character equals a quote, brace or bracket, so offsets are exact and only
whole elements are ever decoded. Nesting is counted, not recursed into, so depth cannot exhaust a stack.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import BinaryIO, NoReturn

from teacher_cache.errors import DataError

CHUNK_BYTES = 1 << 20
MAX_ROW_BYTES = 64 << 20
"""A longer element is refused: that is what a missing quote looks like, and it would fill the memory."""

_BOM = b"\xef\xbb\xbf"
_SPACE = re.compile(rb"[ \t\r\n]*")
# Possessive (``*+``): the alternatives are disjoint, so giving characters back could never help, only cost time.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
# Inside an element only strings and brackets matter. A quote alone is a string that the window cuts.
_INSIDE = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|["\[\]{}]', re.DOTALL)
_SCALAR = re.compile(rb'[^\s,\[\]{}"]*')
_QUOTE, _OPEN = ord('"'), frozenset(b"[{")


def split_json_list(stream: BinaryIO, name: str, chunk_bytes: int = CHUNK_BYTES) -> Iterator[tuple[int, bytes]]:
    """Yield (byte offset in the stream, bytes) of every element of the one JSON list in ``stream``.

    Elements are cut out, not parsed: each is one balanced value or a stretch that ``json.loads`` will refuse.
    Memory: two chunks plus one element.

    Raises:
        DataError: not a JSON list, cut off, or followed by something; names file, row and byte.
    """
    window = _Window(stream, name, chunk_bytes)
    window.enter_list()
    if window.next_byte() == b"]":
        window.at += 1
    else:
        while True:
            yield window.take_element()
            window.row += 1
            separator = window.next_byte()
            if separator not in (b",", b"]"):
                seen = f"found {separator.decode('latin-1')!r}" if separator else "the file ends (truncated?)"
                window.fail(f"expected ',' or ']' after row {window.row - 1}, {seen}")
            window.at += 1
            if separator == b"]":
                break
    if window.next_byte():
        window.fail("there is more text after the list's end")


class _Window:
    """The part of the stream in memory: ``data`` begins at byte ``base``; ``at`` is the position in ``data``."""

    def __init__(self, stream: BinaryIO, name: str, chunk_bytes: int):
        self.stream, self.name, self.chunk_bytes = stream, name, chunk_bytes
        self.data, self.base, self.at, self.row, self.ended = b"", 0, 0, 0, False

    def fail(self, what: str, byte: int | None = None) -> NoReturn:
        byte = self.base + self.at if byte is None else byte
        raise broken_json(self.name, self.row, byte, what)

    def grow(self) -> bool:
        """Drop what was consumed and read on, at least doubling what is held so that long rows stay linear."""
        kept = self.data[self.at :]
        chunk = b"" if self.ended else self.stream.read(max(self.chunk_bytes, len(kept)))
        self.ended = not chunk
        self.data, self.base, self.at = kept + chunk, self.base + self.at, 0
        return bool(chunk)

    def next_byte(self) -> bytes:
        """The next byte that is not white space, not consumed; empty at the file's end."""
        while True:
            space = _SPACE.match(self.data, self.at)
            assert space is not None  # the pattern matches the empty string
            self.at = space.end()
            if self.at < len(self.data) or not self.grow():
                return self.data[self.at : self.at + 1]

    def enter_list(self) -> None:
        while len(self.data) < len(_BOM) and self.grow():
            pass
        if self.data.startswith((b"\xff\xfe", b"\xfe\xff")):
            self.fail("the file is UTF-16; save it as UTF-8")
        if self.data.startswith(_BOM):
            self.at = len(_BOM)
        first = self.next_byte()
        if not first:
            self.fail("the file is empty; expected one JSON list '[…]'")
        if first != b"[":
            self.fail(f"expected one JSON list '[…]', found {first.decode('latin-1')!r}")
        self.at += 1

    def take_element(self) -> tuple[int, bytes]:
        """Cut out the next element and step over it."""
        if not self.next_byte():
            self.fail("the file ends inside the list (truncated?)")
        while True:
            end = _value_end(self.data, self.at)
            # A value that touches the window's end may go on behind it (``12`` of ``123``).
            if end is not None and (end < len(self.data) or self.ended):
                break
            if len(self.data) - self.at > MAX_ROW_BYTES:
                self.fail(f"a row longer than {MAX_ROW_BYTES:,} bytes starts here (missing quote or bracket?)")
            if not self.grow() and end is None:
                self.fail("the row that starts here never ends (truncated file, or a missing quote or bracket)")
        start, element = self.at, self.data[self.at : end]
        if not element:
            stray = self.data[start : start + 1].decode("latin-1")
            self.fail(f"expected a row, found {stray!r} (stray comma or bracket)")
        self.at = end
        return self.base + start, element


def _value_end(data: bytes, at: int) -> int | None:
    """Position behind the value that starts at ``at``; None: its end is not in ``data``."""
    first = data[at]
    if first == _QUOTE:
        string = _STRING.match(data, at)
        return string.end() if string else None
    if first not in _OPEN:
        scalar = _SCALAR.match(data, at)
        assert scalar is not None  # the pattern matches the empty string
        return scalar.end()
    depth = 0
    for token in _INSIDE.finditer(data, at):
        byte = data[token.start()]
        if byte == _QUOTE:
            if token.end() - token.start() == 1:
                return None
        elif byte in _OPEN:
            depth += 1
        else:
            depth -= 1
            if depth == 0:
                return token.end()
    return None


def broken_json(name: str, row: int, byte: int, what: str) -> DataError:
    return DataError(f"{name}: unreadable json at row {row}, byte {byte}: {what}; fix the file or fetch it again")
