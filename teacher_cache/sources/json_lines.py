"""Splits a file of one JSON value a line into its lines, in bounded memory: byte offset, line number and bytes of each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from teacher_cache.errors import DataError
from teacher_cache.sources.json_list import CHUNK_BYTES, MAX_ROW_BYTES

_BOM = b"\xef\xbb\xbf"


def split_lines(
    stream: BinaryIO, name: str, offset: int = 0, number: int = 1, chunk_bytes: int = CHUNK_BYTES
) -> Iterator[tuple[int, int, bytes, bool]]:
    """Yield (byte offset, line number from 1, bytes, whether a line feed ends it) of every line that is not blank.

    A byte order mark and white space around a line (the carriage return of Windows) are no part of it; offsets count them. Memory: a
    chunk plus one line.

    Args:
        offset, number: where the stream stands, at a line's beginning.

    Raises:
        DataError: a line is longer than ``MAX_ROW_BYTES``, or the file is UTF-16; names file and line.
    """
    for start, line, data, ended in _raw_lines(stream, name, offset, number, chunk_bytes):
        if start == 0 and data.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise DataError(f"{name}: the file is UTF-16; save it as UTF-8")
        whole = data.removeprefix(_BOM) if start == 0 else data
        text = whole.lstrip(b" \t\r")
        if stripped := text.rstrip(b" \t\r"):
            yield start + len(data) - len(text), line, stripped, ended


def _raw_lines(
    stream: BinaryIO, name: str, offset: int, number: int, chunk_bytes: int
) -> Iterator[tuple[int, int, bytes, bool]]:
    pieces: list[bytes] = []
    held = 0
    while chunk := stream.read(chunk_bytes):
        at = 0
        while (end := chunk.find(b"\n", at)) >= 0:
            data = b"".join([*pieces, chunk[at:end]])
            yield offset, number, data, True
            offset, number, at = offset + len(data) + 1, number + 1, end + 1
            pieces, held = [], 0
        pieces.append(chunk[at:])
        held += len(chunk) - at
        if held > MAX_ROW_BYTES:
            raise DataError(
                f"{name}: line {number}, at byte {offset}, is longer than {MAX_ROW_BYTES:,} bytes: the format is one JSON object per line"
            )
    if held:
        yield offset, number, b"".join(pieces), False
