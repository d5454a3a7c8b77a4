"""WebDataset tars: the files of a sample share a name up to the first dot and stand side by side.

- **Images**: ``jpg, jpeg, png, webp, gif, bmp, tif, tiff``, one (``x.jpg``), several (``x.0.jpg``, ``x.img1.png``: by their numbers, or in
  the order in which the row names them) or none.
- **Text**: ``x.json`` with ``conversations``, ``messages``, or ``prompt`` and ``completion`` (see ``message_rows``). A json
  without them is metadata (as img2dataset writes it): then ``x.txt`` is the caption, else its ``caption`` or ``text``. A caption
  is the answer to a user turn of images alone.
- A sample with a video or a sound is skipped.
- Further files of a sample are not read, whatever they hold; nothing is unpickled. Names that begin with a dot or have none are no samples.
- Keys may repeat in a tar where other samples stand between; what stands side by side is one sample, and one file twice in it is a bad row.

A scan reads the headers and the texts and notes the byte range of each row group; a read seeks there. A tar that is cut off is an error.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

from teacher_cache.errors import DataError, SkipSample, printable
from teacher_cache.records import Image, RowGroup, Sample, SkipRecord, Turn
from teacher_cache.sources import DataSpec, files
from teacher_cache.sources.grouping import RowRange, group_rows_of
from teacher_cache.sources.image_folder import check_size
from teacher_cache.sources.image_refs import MEDIA, ImageRef
from teacher_cache.sources.json_list import MAX_ROW_BYTES
from teacher_cache.sources.message_rows import COLUMNS, TALK, MessageRow, read_row, read_sample
from teacher_cache.sources.row_limits import refuse_media_columns, refuse_unlabelled_row
from teacher_cache.sources.row_values import Unparsed, checked_text, extra_of, row_object
from teacher_cache.sources.tar_members import BLOCK, Member, read_members
from teacher_cache.sources.usable_samples import PLACEHOLDER

FORMAT = "webdataset"

IMAGES = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"})
MAX_FILES = 1000
"""Of one sample; more are not remembered, and the row is skipped."""

_CAPTIONS = ("caption", "text")
_KEY = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)
_DIGITS = re.compile(r"([0-9]+)")


def matches(paths: list[str]) -> bool:
    """True if every file is a tar by its content or its name."""
    return all(_looks_like_tar(path) for path in paths)


def _looks_like_tar(path: str) -> bool:
    return path.endswith(".tar") or files.first_bytes(path, BLOCK)[257:262] == b"ustar"


def open(spec: DataSpec, paths: list[str]) -> WebDataset:
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
                    found = _row(stream, sample, _json_of(stream, sample))
                    characters, images = found.characters, len(found.refs)
                except SkipSample:
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
            raise DataError(f"{path}: the data from byte {where['offset']:,} on differs from the scan: the tar changed")

    def _sample(self, stream: BinaryIO, sample: _Files, ordinal: int, place: str) -> Sample | SkipRecord:
        empty = Sample(self.spec.part, ordinal, _shown(sample.key), place, ())
        made = read_sample(
            empty,
            _json_of(stream, sample),
            lambda value: _row(stream, sample, value),
            lambda ref: _image(stream, sample, ref),
        )
        is_named = made.source_id != empty.source_id or isinstance(made, SkipRecord)
        return made if is_named else replace(made, source_id=sample.key)


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


def _json_of(stream: BinaryIO, sample: _Files) -> Any:
    """What the sample's json holds, ``Unparsed`` where it cannot be read; an empty object where there is none."""
    member = dict(sample.members).get("json")
    if member is None or member.kind:
        return {}
    try:
        row = json.loads(_text(stream, member))
    except RecursionError:
        return Unparsed(f"{member.name[:80]!r} is nested too deep")
    except ValueError as error:
        return Unparsed(f"{member.name[:80]!r} is not JSON: {str(error)[:80]}")
    except SkipSample as skip:
        return Unparsed(skip.detail)
    return {"conversations": row} if isinstance(row, list) else row  # a bare list of turns


def _row(stream: BinaryIO, sample: _Files, value: Any) -> MessageRow:
    """Turns, images (each named by its member), further columns.

    Raises:
        SkipSample: bad_row, image_missing, placeholder_mismatch, media_unsupported and what else ``read_row`` raises.
    """
    _check_files(sample)
    checked_text(sample.key, "the key")
    images = [checked_text(member.name, "a file's name") for _, member in sorted(_images(sample), key=_natural)]
    row = row_object(value)
    if any(row.get(name) is not None for name in TALK):
        found = read_row(row, images)
    else:
        refuse_media_columns(row)
        refuse_unlabelled_row(row)
        found = _caption(_caption_text(stream, dict(sample.members), row), images, extra_of(row, COLUMNS - {"system"}))
    return replace(found, extra={name: one for name, one in found.extra.items() if name not in _CAPTIONS})


def _check_files(sample: _Files) -> None:
    if len(sample.members) > MAX_FILES:
        raise SkipSample("bad_row", f"more than {MAX_FILES} files share the key")
    seen = set()
    for suffix, member in sample.members:
        if suffix.rpartition(".")[2] in MEDIA:
            raise SkipSample("media_unsupported", f"the sample has {member.name[:80]!r}")
        if member.kind:
            raise SkipSample("bad_row", f"{member.name[:80]!r} is {member.kind} in the tar, no plain file")
        if suffix in seen:
            raise SkipSample("bad_row", f"two files {suffix[:80]!r} of one key: keys must differ from sample to sample")
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
        raise SkipSample("bad_row", f"{member.name[:80]!r} has {member.size:,} bytes, more than {MAX_ROW_BYTES:,}")
    data = _bytes(stream, member)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SkipSample("bad_row", f"{member.name[:80]!r} is not UTF-8 at byte {error.start}") from error


def _bytes(stream: BinaryIO, member: Member) -> bytes:
    stream.seek(member.data)
    return stream.read(member.size)


def _caption_text(stream: BinaryIO, named: Mapping[str, Member], row: Mapping[str, Any]) -> str:
    if "txt" in named:
        return _text(stream, named["txt"]).strip()
    caption = next((row[name] for name in _CAPTIONS if row.get(name) is not None), None)
    if caption is None:
        what = "a json without conversation or caption" if "json" in named else "neither json nor txt"
        raise SkipSample("bad_row", f"the sample has {what}; are the files of a sample side by side in the tar?")
    return checked_text(caption, "the caption").strip()


def _caption(text: str, images: Sequence[str], extra: dict[str, Any]) -> MessageRow:
    if not images:
        raise SkipSample("image_missing", "a caption without an image")
    turns = Turn("user", "\n".join([PLACEHOLDER] * len(images))), Turn("assistant", text)
    return MessageRow(turns, tuple(map(ImageRef, images)), extra)


def _image(stream: BinaryIO, sample: _Files, ref: ImageRef) -> Image:
    if ref.inline is not None:
        data = ref.decode()
        check_size(ref.name, len(data))
        return Image(ref.name, data)
    member = next(member for _, member in sample.members if member.name == ref.name)
    if not member.size:
        raise SkipSample("image_missing", f"{member.name[:80]!r} is empty (0 bytes)")
    check_size(member.name[:80], member.size)
    return Image(member.name, _bytes(stream, member))
