"""WebDataset tars: the files of a sample share a name up to the first dot and stand side by side.

- **Images**: ``jpg, jpeg, png, webp, gif, bmp, tif, tiff``, one (``x.jpg``), several (``x.0.jpg``, ``x.img1.png``: by their numbers, or in
  the order in which the row names them) or none.
- **Text**: ``x.json`` with LLaVA's ``conversations``, or with ``messages`` / ``prompt`` and ``completion`` (see ``message_rows``). A json
  without them is metadata (as img2dataset writes it): then ``x.txt`` is the caption, else its ``caption`` or ``text``. A caption
  is the answer to a user turn of images alone.
- Further files of a sample are not read, whatever they hold; nothing is unpickled. Names that begin with a dot or have none are no samples.
- Keys may repeat in a tar where other samples stand between; what stands side by side is one sample, and one file twice in it is a bad row.

A scan reads the headers and the texts and notes the byte range of each row group; a read seeks there. A tar that is cut off is an error.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from teacher_cache.errors import DataError, SkipRow, printable
from teacher_cache.records import Image, RowGroup, Sample, SkipRecord, Turn
from teacher_cache.rows import PLACEHOLDER
from teacher_cache.sources import DataSpec, files
from teacher_cache.sources.grouping import RowRange, group_rows_of
from teacher_cache.sources.image_folder import MAX_IMAGE_BYTES
from teacher_cache.sources.json_list import MAX_ROW_BYTES
from teacher_cache.sources.llava_rows import checked_text, extra_of, source_id_of
from teacher_cache.sources.message_rows import COLUMNS, ImageRef, rows_turns
from teacher_cache.sources.tar_members import BLOCK, Member, read_members

FORMAT = "webdataset"

IMAGES = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"})
MAX_FILES = 1000
"""Of one sample; more are not remembered, and the row is skipped."""

_KNOWN = COLUMNS | {"id", "caption", "text"}
_TALK = ("messages", "conversations", "prompt", "completion")
_COMPRESSED = ((b"\x1f\x8b", "gunzip"), (b"BZh", "bunzip2"), (b"\xfd7zXZ", "unxz"), (b"\x28\xb5\x2f\xfd", "unzstd"))
_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_KEY = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)
_DIGITS = re.compile(r"([0-9]+)")


def matches(paths: list[str]) -> bool:
    """True if every file is a tar by its content or its name (a compressed one too: its error then says what to do)."""
    return all(_looks_like_tar(path) for path in paths)


def _looks_like_tar(path: str) -> bool:
    return path.endswith((".tar", *_SUFFIXES)) or files.first_bytes(path, BLOCK)[257:262] == b"ustar"


def open(spec: DataSpec, paths: list[str]) -> WebDataset:
    for path in paths:
        start = files.first_bytes(path, 8)
        for magic, program in _COMPRESSED:
            if start.startswith(magic):
                raise DataError(
                    f"{path} is compressed, and rows are found by seeking: unpack it first ({program}); images hardly shrink"
                )
    return WebDataset(spec, tuple(paths))


@dataclass(frozen=True)
class _Files:
    """One sample's files: (what follows the key's dot, in lower case, where it is)."""

    key: str
    members: tuple[tuple[str, Member], ...]
    begin: int
    end: int


@dataclass(frozen=True)
class WebDataset:
    """``teacher_cache.sources.Source`` over one or more tars. Holds no open file: any thread may read."""

    spec: DataSpec
    paths: tuple[str, ...]

    def fingerprint(self) -> dict[str, Any]:
        return files.fingerprint_files(FORMAT, list(self.paths))

    def scan(self, group_rows: int) -> list[RowGroup]:
        """Memory: the texts of one sample and the list of groups. Images are not read.

        Raises:
            DataError: a tar is damaged or cut off; names file and byte.
        """
        return group_rows_of(len(self.paths), self._ranges, group_rows, self.spec.limit)

    def _ranges(self, file: int) -> Iterator[RowRange]:
        path = self.paths[file]
        with files.open_binary(path) as stream:
            for row, sample in enumerate(_samples(stream, path)):
                characters = images = 0
                try:
                    _, turns, refs, _ = _row(stream, sample)
                    characters, images = sum(len(turn.text) for turn in turns), len(refs)
                except SkipRow:
                    pass  # counts as nothing here, and becomes a skip record when it is read
                yield RowRange(sample.begin, sample.end, characters, images, {"row": row})

    def read(self, group: RowGroup) -> Iterator[Sample | SkipRecord]:
        """Memory: one sample with its images.

        Raises:
            DataError: the tar changed since the scan, or a disk failed.
        """
        where, count, end = group.locator, 0, 0
        path = self.paths[where["file"]]
        name = os.path.basename(path)
        with files.open_binary(path) as stream:
            for sample in _samples(stream, path, where["offset"], where["end"]):
                place = f"{name} row {where['row'] + count} ({_shown(sample.key)})"
                yield self._sample(stream, sample, group.start + count, place)
                count, end = count + 1, sample.end
        if (count, end) != (group.rows, where["end"]):
            raise DataError(
                f"{path}: what stands from byte {where['offset']:,} on is not what the scan saw: the tar changed"
            )

    def _sample(self, stream: BinaryIO, sample: _Files, ordinal: int, place: str) -> Sample | SkipRecord:
        source_id = _shown(sample.key)
        try:
            source_id, turns, refs, extra = _row(stream, sample)
            images = tuple(_image(stream, sample, ref) for ref in refs)
        except SkipRow as skip:
            return SkipRecord(self.spec.part, ordinal, source_id, place, skip.reason, skip.detail)
        return Sample(self.spec.part, ordinal, source_id, place, turns, images, extra)


def _shown(key: str) -> str:
    return printable(key[:200])


def _samples(stream: BinaryIO, path: str, begin: int = 0, stop: int | None = None) -> Iterator[_Files]:
    """Runs of members with one key; what belongs to no sample is passed over."""
    run: list[tuple[str, Member]] = []
    key, first, last = "", 0, 0
    for member in read_members(stream, path, begin, stop):
        found = _KEY.fullmatch(member.name)
        if found is None:
            continue
        if run and found[1] != key:
            yield _Files(key, tuple(run), first, last)
            run = []
        if not run:
            key, first = found[1], member.begin
        if len(run) <= MAX_FILES:
            run.append((found[2].lower(), member))
        last = member.end
    if run:
        yield _Files(key, tuple(run), first, last)


def _row(stream: BinaryIO, sample: _Files) -> tuple[str, tuple[Turn, ...], tuple[ImageRef, ...], dict[str, Any]]:
    """Id, turns, images (each named by its member), extra columns.

    Raises:
        SkipRow: bad_row, image_missing, placeholder_mismatch.
    """
    named = dict(sample.members)
    _check_files(sample)
    images = [member.name for _, member in sorted(_images(sample), key=_natural)]
    row = _json(stream, named["json"]) if "json" in named else {}
    if isinstance(row, list):  # a bare list of turns
        row = {"conversations": row}
    if not isinstance(row, dict):
        raise SkipRow("bad_row", f"the json is {type(row).__name__}, not an object")
    if any(row.get(name) is not None for name in _TALK):
        turns, refs = rows_turns(row, [checked_text(name, "a file's name") for name in images])
    else:
        turns, refs = _caption(_caption_text(stream, named, row), images)
    source_id = source_id_of(row.get("id")) or checked_text(sample.key, "the key")
    return source_id, turns, refs, extra_of(row, _KNOWN)


def _check_files(sample: _Files) -> None:
    if len(sample.members) > MAX_FILES:
        raise SkipRow("bad_row", f"more than {MAX_FILES} files share the key")
    seen = set()
    for suffix, member in sample.members:
        if member.kind:
            raise SkipRow("bad_row", f"{member.name[:80]!r} is {member.kind} in the tar, no plain file")
        if suffix in seen:
            raise SkipRow("bad_row", f"two files {suffix[:80]!r} of one key: keys must differ from sample to sample")
        seen.add(suffix)


def _images(sample: _Files) -> list[tuple[str, Member]]:
    return [(suffix, member) for suffix, member in sample.members if suffix.rpartition(".")[2] in IMAGES]


def _natural(item: tuple[str, Member]) -> list[tuple[bool, int, str]]:
    """``jpg``, ``0.jpg``, ``img2.jpg``, ``img10.jpg``: numbers by their value, a suffix alone first."""
    name = item[0].rpartition(".")[0]
    pieces = [(number % 2 == 0, one) for number, one in enumerate(_DIGITS.split(name))]
    values = [(is_word, one if is_word else one.lstrip("0")) for is_word, one in pieces if one]
    # Without leading zeros the longer number is the larger; Python would not take thousands of digits for a number.
    return [(is_word, 0 if is_word else len(one), one) for is_word, one in values]


def _text(stream: BinaryIO, member: Member) -> str:
    if member.size > MAX_ROW_BYTES:
        raise SkipRow("bad_row", f"{member.name[:80]!r} has {member.size:,} bytes, more than {MAX_ROW_BYTES:,}")
    data = _bytes(stream, member)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SkipRow("bad_row", f"{member.name[:80]!r} is not UTF-8 at byte {error.start}") from error


def _json(stream: BinaryIO, member: Member) -> Any:
    try:
        return json.loads(_text(stream, member))
    except RecursionError:
        raise SkipRow("bad_row", f"{member.name[:80]!r} is nested too deep") from None
    except ValueError as error:
        raise SkipRow("bad_row", f"{member.name[:80]!r} is no JSON: {str(error)[:80]}") from error


def _bytes(stream: BinaryIO, member: Member) -> bytes:
    stream.seek(member.data)
    return stream.read(member.size)


def _caption_text(stream: BinaryIO, named: dict[str, Member], row: dict[str, Any]) -> str:
    if "txt" in named:
        return _text(stream, named["txt"]).strip()
    caption = next((row[name] for name in ("caption", "text") if row.get(name) is not None), None)
    if caption is None:
        what = "a json without conversation or caption" if "json" in named else "neither json nor txt"
        raise SkipRow("bad_row", f"the sample has {what}; are the files of a sample side by side in the tar?")
    return checked_text(caption, "the caption").strip()


def _caption(text: str, images: Sequence[str]) -> tuple[tuple[Turn, ...], tuple[ImageRef, ...]]:
    if not images:
        raise SkipRow("image_missing", "a caption without an image")
    turns = Turn("user", "\n".join([PLACEHOLDER] * len(images))), Turn("assistant", text)
    return turns, tuple(ImageRef(checked_text(name, "a file's name")) for name in images)


def _image(stream: BinaryIO, sample: _Files, ref: ImageRef) -> Image:
    if ref.inline is not None:
        return Image(ref.name, ref.decode())
    member = next(member for _, member in sample.members if member.name == ref.name)
    if not member.size:
        raise SkipRow("image_missing", f"{member.name[:80]!r} is empty (0 bytes)")
    if member.size > MAX_IMAGE_BYTES:
        raise SkipRow(
            "image_too_large", f"{member.name[:80]!r} has {member.size:,} bytes, more than {MAX_IMAGE_BYTES:,}"
        )
    return Image(member.name, _bytes(stream, member))
