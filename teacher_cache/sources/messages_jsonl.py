"""Messages JSONL (TRL, Qwen): one JSON object a line, ``messages`` with text or parts, or ``prompt`` and ``completion``, and images.

``messages`` (or ``prompt`` and ``completion``, texts or lists of messages; or LLaVA's ``conversations``) hold ``{role, content}`` of the
roles system, user and assistant. ``content`` is text or a list of parts ``{type: text, text}``, ``{type: image, image | path | url}``,
``{type: image_url, image_url}``. An image is a path below the image root, a ``data:`` URI, or ``{bytes: base64, path}``; addresses in the
web are never fetched. Which image stands where is told in ``message_rows``.

The file is streamed: a scan notes the byte range of each row group, a read seeks there. A line that is no row costs only itself.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

from teacher_cache.errors import DataError, SkipSample
from teacher_cache.records import RowGroup, Sample, SkipRecord
from teacher_cache.sources import DataSpec, files
from teacher_cache.sources.files_and_images import FilesAndImages
from teacher_cache.sources.grouping import RowRange, group_rows_of
from teacher_cache.sources.json_lines import split_lines
from teacher_cache.sources.message_rows import TALK, read_row, read_sample
from teacher_cache.sources.row_values import Unparsed

FORMAT = "messages-jsonl"

_SUFFIXES = (".jsonl", ".ndjson", ".jsonlines")
_LOOK_BYTES = 1 << 20


def matches(paths: list[str]) -> bool:
    """True if every file starts with an object and is called ``.jsonl``, or its first line is a whole row."""
    return all(_looks_like_lines(path) for path in paths)


def _looks_like_lines(path: str) -> bool:
    start = files.first_bytes(path, _LOOK_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n")
    if path.endswith(_SUFFIXES):
        return start[:1] in (b"{", b"")
    try:
        row = json.loads(start.partition(b"\n")[0]) if start[:1] == b"{" else None
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and bool(row.keys() & set(TALK))


def open(spec: DataSpec, paths: list[str]) -> MessagesJsonl:
    return MessagesJsonl.of(spec, paths)


class MessagesJsonl(FilesAndImages):
    """``teacher_cache.sources.Source`` over one or more files."""

    FORMAT = FORMAT

    def scan(self, group_rows: int) -> list[RowGroup]:
        """Memory: one chunk, one line and the list of groups.

        Raises:
            DataError: the last line is cut off, objects go on over several lines, a line is longer than 64 MB, or rows name image files
                but there is no image root.
        """
        return group_rows_of(len(self.paths), self._ranges, group_rows, self.spec.limit)

    def _ranges(self, file: int) -> Iterator[RowRange]:
        path = self.paths[file]
        before = b""  # the line before, where it is no row
        with files.open_binary(path) as stream:
            for offset, line, data, ended in split_lines(stream, path):
                value, characters, images = _parse(data), 0, 0
                if before and not isinstance(value, dict) and _goes_on(before, data):
                    raise DataError(
                        f"{path}: the format is one JSON object per line, and one that begins before line {line} continues in it: "
                        f"write it so (`jq -c . {path} > rows.jsonl`; a list: `jq -c '.[]'`)"
                    )
                before = data if isinstance(value, Unparsed) and data[:1] in (b"{", b"[") else b""
                if isinstance(value, Unparsed) and not ended:
                    raise DataError(
                        f"{path}: line {line}, the last, is cut off at byte {offset + len(data)} ({value.why}): fetch the file again"
                    )
                try:
                    row = read_row(value)
                except SkipSample:
                    pass  # counts as nothing here, and becomes a skip record when it is read
                else:
                    if any(ref.inline is None for ref in row.refs):
                        self.images.check()
                    characters, images = row.characters, len(row.refs)
                yield RowRange(offset, offset + len(data), characters, images, {"line": line})

    def read(self, group: RowGroup) -> Iterator[Sample | SkipRecord]:
        """Memory: one chunk and one line.

        Raises:
            DataError: the file changed since the scan, the image root is gone, or a disk failed.
        """
        where, end, count = group.locator, 0, 0
        path = self.paths[where["file"]]
        with files.open_binary(path) as stream:
            stream.seek(where["offset"])
            lines = split_lines(stream, path, where["offset"], where["line"])
            for ordinal, (offset, line, data, _) in zip(range(group.start, group.start + group.rows), lines):
                end, count = offset + len(data), count + 1
                empty = Sample(self.spec.part, ordinal, "", f"{os.path.basename(path)} line {line}", ())
                yield read_sample(empty, _parse(data), read_row, self.images.fetch)
        if (count, end) != (group.rows, where["end"]):
            raise DataError(
                f"{path}: line {where['line']} and the following text differ from the scan: the file changed"
            )


def _goes_on(line: bytes, following: bytes) -> bool:
    """True where two lines together are JSON as far as they go, so that neither is merely damaged."""
    text = (line + b"\n" + following).decode("utf-8", "replace").rstrip(", ")
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return error.pos >= len(text)
    except (ValueError, RecursionError):
        return False
    return True


def _parse(data: bytes) -> Any:
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Unparsed(f"not UTF-8 at byte {error.start} of the line")
    except RecursionError:
        return Unparsed("nested too deep")
    except json.JSONDecodeError as error:
        return Unparsed(f"no JSON: {error.msg} at character {error.pos} of the line")
    except ValueError as error:
        return Unparsed(str(error).partition(":")[0])
