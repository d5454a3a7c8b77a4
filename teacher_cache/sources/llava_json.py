"""LLaVA-1.5 json: one JSON list of ``{id, image?: path or list of paths, conversations: [{from, value}]}``.

The file (1 GB for mix665k) is streamed: a scan notes the byte range of each row group, a read seeks there.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from teacher_cache.errors import SkipRow
from teacher_cache.records import Image, RowGroup, Sample, SkipRecord, Turn
from teacher_cache.sources import DataSpec, files
from teacher_cache.sources.image_folder import ImageFolder
from teacher_cache.sources.json_list import broken_json, split_json_list
from teacher_cache.sources.llava_rows import checked_text, extra_of, source_id_of, turns_of

FORMAT = "llava-json"

_KNOWN = frozenset({"id", "image", "conversations"})


def matches(paths: list[str]) -> bool:
    """True if every file starts like a JSON list (an empty ``.json`` too: its error then names what is wrong)."""
    return all(_looks_like_list(path) for path in paths)


def _looks_like_list(path: str) -> bool:
    start = files.first_bytes(path, 4096).removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n")
    return start[:1] == b"[" or (not start and path.endswith(".json"))


def open(spec: DataSpec, paths: list[str]) -> LlavaJson:
    root = spec.image_root if spec.image_root is not None else os.path.dirname(paths[0]) or "."
    return LlavaJson(spec, tuple(paths), ImageFolder(root, spec.follow_links))


@dataclass(frozen=True)
class LlavaJson:
    """``teacher_cache.sources.Source`` over one or more json files. Holds no open file: any thread may read."""

    spec: DataSpec
    paths: tuple[str, ...]
    images: ImageFolder

    def fingerprint(self) -> dict[str, Any]:
        return files.fingerprint_files(FORMAT, list(self.paths))

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
        name = os.path.basename(path)

        def group() -> RowGroup:
            locator = {"file": file, "offset": offset, "bytes": end - offset, "row": row - rows}
            return RowGroup(start + row - rows, rows, locator, characters, image_count)

        if most == 0:
            return
        with files.open_binary(path) as stream:
            for at, element in split_json_list(stream, path):
                text_length, images = self._measure(parse_element(element, path, row, at), name)
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

    def _measure(self, value: Any, name: str) -> tuple[int, int]:
        """(characters, images) of one row; a bad row counts as nothing here and becomes a skip record when read."""
        try:
            _, turns, image_names, _ = parse_row(value)
        except SkipRow:
            return 0, 0
        if image_names:
            self.images.check()
        return sum(len(turn.text) for turn in turns), len(image_names)

    def read(self, group: RowGroup) -> Iterator[Sample | SkipRecord]:
        """
        Raises:
            DataError: the file changed since the scan, the image root is gone, or a disk failed.
        """
        where = group.locator
        path = self.paths[where["file"]]
        with files.open_binary(path) as stream:
            stream.seek(where["offset"])
            data = stream.read(where["bytes"])
        count = 0
        for at, element in split_json_list(io.BytesIO(b"[" + data + b"]"), f"{path} (changed since it was scanned?)"):
            row = where["row"] + count
            value = parse_element(element, path, row, where["offset"] + at - 1)
            yield self._sample(value, group.start + count, f"{os.path.basename(path)} row {row}")
            count += 1
        if count != group.rows:
            what = f"{count} rows where the scan saw {group.rows}: the file changed"
            raise broken_json(path, where["row"], where["offset"], what)

    def _sample(self, value: Any, ordinal: int, place: str) -> Sample | SkipRecord:
        source_id = ""
        try:
            source_id, turns, image_names, extra = parse_row(value)
            if image_names:
                self.images.check()
            images = tuple(Image(name, self.images.read(name)) for name in image_names)
        except SkipRow as skip:
            return SkipRecord(self.spec.part, ordinal, source_id, place, skip.reason, skip.detail)
        return Sample(self.spec.part, ordinal, source_id, place, turns, images, extra)


@dataclass(frozen=True)
class Unparsed:
    """A row whose borders are certain but whose value Python cannot hold; ``why`` goes into the skip record."""

    why: str


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


def parse_row(value: Any) -> tuple[str, tuple[Turn, ...], tuple[str, ...], dict[str, Any]]:
    """Id, turns, image paths, extra columns.

    Raises:
        SkipRow: bad_row.
    """
    if isinstance(value, Unparsed):
        raise SkipRow("bad_row", value.why)
    if not isinstance(value, dict):
        raise SkipRow("bad_row", f"the row is {type(value).__name__}, not an object")
    image = value.get("image")
    # Text-only rows are written without the key, with null, or with "".
    listed = [] if image is None or image == "" else image if isinstance(image, list) else [image]
    names = tuple(checked_text(name, "'image'") for name in listed)
    return source_id_of(value.get("id")), turns_of(value.get("conversations")), names, extra_of(value, _KNOWN)
