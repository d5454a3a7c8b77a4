"""LLaVA-1.5 json: one JSON list of ``{id, image?: path or list of paths, conversations: [{from, value}]}`` or like rows (``message_rows``).

The file (1 GB for mix665k) is streamed: a scan notes the byte range of each row group, a read seeks there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

from teacher_cache.errors import DataError, SkipSample
from teacher_cache.records import RowGroup, Sample, SkipRecord
from teacher_cache.sources import DataSpec, files
from teacher_cache.sources.files_and_images import FilesAndImages
from teacher_cache.sources.foreign import described
from teacher_cache.sources.json_list import broken_json, split_json_list
from teacher_cache.sources.message_rows import read_row, read_sample
from teacher_cache.sources.row_values import Unparsed

FORMAT = "llava-json"


def matches(paths: list[str]) -> bool:
    """True if every file starts like a JSON list (an empty ``.json`` too: its error then names what is wrong)."""
    return all(_looks_like_list(path) for path in paths)


def _looks_like_list(path: str) -> bool:
    start = files.first_bytes(path, 4096).removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n")
    return start[:1] == b"[" or (not start and path.endswith(".json"))


def open(spec: DataSpec, paths: list[str]) -> LlavaJson:
    """DataError where the format was given and a file begins with an object."""
    if files.first_bytes(paths[0], 1) == b"{" and (what := described(paths[0])):
        raise DataError(f"{paths[0]} is not a JSON list: {what}")
    return LlavaJson.of(spec, paths)


class LlavaJson(FilesAndImages):
    """``teacher_cache.sources.Source`` over one or more json files."""

    FORMAT = FORMAT

    def scan(self, group_rows: int) -> list[RowGroup]:
        """Memory: one chunk, one row and the list of groups.

        Raises:
            DataError: unreadable json (file, row, byte), or rows with images but no image root.
        """
        groups: list[RowGroup] = []
        start = 0
        for file, path in enumerate(self.paths):
            for group in self._scan_file(file, path, start, group_rows):
                groups.append(group)
                start += group.rows
        return groups

    def _scan_file(self, file: int, path: str, start: int, group_rows: int) -> Iterator[RowGroup]:
        """Groups of one file; their locator is the file's number, byte range and first row in the file."""
        most = None if self.spec.limit is None else self.spec.limit - start
        row = rows = characters = image_count = offset = end = 0

        def group() -> RowGroup:
            locator = {"file": file, "offset": offset, "bytes": end - offset, "row": row - rows}
            return RowGroup(start + row - rows, rows, locator, characters, image_count)

        if most == 0:
            return
        with files.open_binary(path) as stream:
            for at, element in split_json_list(stream, path):
                text_length, images = self._measure(parse_element(element, path, row, at))
                offset = at if rows == 0 else offset
                end, rows, row = at + len(element), rows + 1, row + 1
                characters, image_count = characters + text_length, image_count + images
                if rows == group_rows:
                    yield group()
                    rows = characters = image_count = 0
                if row == most:
                    break
        if rows:
            yield group()

    def _measure(self, value: Any) -> tuple[int, int]:
        """(characters, images) of one row; a bad row counts as nothing here and becomes a skip record when read."""
        try:
            row = read_row(value)
        except SkipSample:
            return 0, 0
        if any(ref.inline is None for ref in row.refs):
            self.images.check()
        return row.characters, len(row.refs)

    def read(self, group: RowGroup) -> Iterator[Sample | SkipRecord]:
        """Memory: one chunk and one row.

        Raises:
            DataError: the file changed since the scan, the image root is gone, or a disk failed.
        """
        where, count = group.locator, 0
        path = self.paths[where["file"]]
        with files.open_binary(path) as stream:
            stream.seek(where["offset"])
            listed = cast(BinaryIO, _Listed(stream, where["bytes"]))
            for at, element in split_json_list(listed, f"{path} (changed since it was scanned?)"):
                row = where["row"] + count
                value = parse_element(element, path, row, where["offset"] + at - 1)
                empty = Sample(self.spec.part, group.start + count, "", f"{os.path.basename(path)} row {row}", ())
                yield read_sample(empty, value, read_row, self.images.fetch)
                count += 1
        if count != group.rows:
            what = f"{count} rows where the scan saw {group.rows}: the file changed"
            raise broken_json(path, where["row"], where["offset"], what)


class _Listed:
    """The next ``size`` bytes of a stream as a list of their own: ``[`` before them and ``]`` behind them."""

    def __init__(self, stream: BinaryIO, size: int):
        self._stream, self._left, self._ends = stream, size, [b"[", b"]"]

    def read(self, count: int) -> bytes:
        if len(self._ends) == 2:
            return self._ends.pop(0)
        if data := self._stream.read(min(count, self._left)):
            self._left -= len(data)
            return data
        return self._ends.pop() if self._ends else b""


def parse_element(element: bytes, path: str, row: int, offset: int) -> Any:
    """The row as Python values, or ``Unparsed`` where only this row suffers (encoding, depth, size of a number).

    Raises:
        DataError: not json. The rows after it cannot be trusted either, since a lost quote shifts every border.
    """
    try:
        text = element.decode("utf-8")
    except UnicodeDecodeError as error:
        return Unparsed(f"not UTF-8 at byte {offset + error.start}")
    try:
        return json.loads(text)
    except RecursionError:
        return Unparsed("nested too deep")
    except json.JSONDecodeError as error:
        byte = offset + len(text[: error.pos].encode("utf-8"))
        raise broken_json(path, row, byte, error.msg) from error
    except ValueError as error:
        return Unparsed(str(error).partition(":")[0])
