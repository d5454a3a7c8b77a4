"""The members of a tar one after the other, in bounded memory, and never past damage.

The standard library ends silently where a header is damaged or the file was cut between two members; half a download then passes for
a small data set. Here a tar is whole when its end blocks are there and nothing but padding follows them. Nothing is ever extracted.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, NoReturn

from teacher_cache.errors import DataError

BLOCK = tarfile.BLOCKSIZE
MAX_HEADER_BYTES = 1 << 20
"""Of the extended headers (long names, attributes) before one member."""

_PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_KINDS = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}
_PADDING_CHUNK = 1 << 20


@dataclass(frozen=True)
class Member:
    """One file of a tar.

    Attributes:
        kind: ``""`` for a plain file, else in words what it is.
        begin: byte of its first header, data: of its content, end: behind its padding.
        size: bytes of content.
    """

    name: str
    kind: str
    begin: int
    data: int
    size: int
    end: int


def read_members(stream: BinaryIO, place: str, begin: int = 0, stop: int | None = None) -> Iterator[Member]:
    """Members from byte ``begin`` on, folders left out, up to byte ``stop`` or (None) to the tar's end, which is checked.

    Memory: one header. Names are as written (bytes that are no UTF-8 as half surrogates): never a path that is opened.

    Raises:
        DataError: a damaged header, a file that is cut off, or more behind the end; names file and byte.
    """
    reader = _TarReader(stream, place)
    at = begin
    while stop is None or at < stop:
        member, at = reader.member(at)
        if member is None:
            reader.check_padding(at)
            return
        if member.kind != "a folder":
            yield member


class _TarReader:
    def __init__(self, stream: BinaryIO, place: str):
        self.stream, self.place = stream, place
        self.size = stream.seek(0, 2)

    def fail(self, at: int, what: str) -> NoReturn:
        raise DataError(f"{self.place}: {what} at byte {at:,}: fetch the tar again, or pack it again")

    def bytes_at(self, at: int, count: int) -> bytes:
        self.stream.seek(at)
        data = self.stream.read(count)
        if len(data) < count:
            self.fail(self.size, "the tar is cut off (no end-of-archive block)")
        return data

    def member(self, begin: int) -> tuple[Member | None, int]:
        """(the member whose headers begin there, byte behind it); (None, byte behind the block) at the archive's end."""
        at, name, size, sparse = begin, None, None, False
        while True:
            block = self.bytes_at(at, BLOCK)
            try:
                info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
                if at != begin:
                    self.fail(at, "an extended header without its member")
                return None, at + BLOCK
            except (tarfile.HeaderError, ValueError, OverflowError) as error:  # type: ignore[attr-defined]
                self.fail(at, f"no tar header ({error})")
            if info.size < 0:
                self.fail(at, "a member of negative size")
            content = at + BLOCK
            end = content + -(-info.size // BLOCK) * BLOCK
            if info.type in (
                tarfile.GNUTYPE_LONGNAME,
                tarfile.GNUTYPE_LONGLINK,
                tarfile.XHDTYPE,
                tarfile.XGLTYPE,
                tarfile.SOLARIS_XHDTYPE,
            ):
                if end - begin > MAX_HEADER_BYTES:
                    self.fail(at, f"extended headers of more than {MAX_HEADER_BYTES:,} bytes")
                data = self.bytes_at(content, info.size)
                if info.type == tarfile.GNUTYPE_LONGNAME:
                    name = data.rstrip(b"\0").decode("utf-8", "surrogateescape")
                elif info.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
                    records = self._records(data, at)
                    name = records.get("path", name)
                    size = self._size(records["size"], at) if "size" in records else size
                    sparse = sparse or any(key.startswith("GNU.sparse.") for key in records)
                at = end
                continue
            return self._plain(info, begin, at, name, size, sparse)

    def _plain(
        self, info: tarfile.TarInfo, begin: int, at: int, name: str | None, size: int | None, sparse: bool
    ) -> tuple[Member, int]:
        size = info.size if size is None else size
        content = at + BLOCK
        if info.type == tarfile.GNUTYPE_SPARSE:
            more = self.bytes_at(at, BLOCK)[482]
            while more:
                more, content = self.bytes_at(content, BLOCK)[504], content + BLOCK
        if info.type in (
            tarfile.LNKTYPE,
            tarfile.SYMTYPE,
            tarfile.CHRTYPE,
            tarfile.BLKTYPE,
            tarfile.FIFOTYPE,
            tarfile.DIRTYPE,
        ):
            size = 0  # what the header says is the size of something else
        end = content + -(-size // BLOCK) * BLOCK
        name = info.name if name is None else name
        if content + size > self.size:
            self.fail(self.size, f"the tar is cut off inside {name[:80]!r}")
        folder = info.type == tarfile.DIRTYPE or (info.type == tarfile.AREGTYPE and name.endswith("/"))
        kind = "a folder" if folder else "" if info.type in _PLAIN else _KINDS.get(info.type, "no plain file")
        return Member(name, "a sparse file" if sparse else kind, begin, content, size, end), end

    def _records(self, data: bytes, at: int) -> dict[str, str]:
        """``LENGTH KEY=VALUE`` lines of an extended header."""
        records = {}
        place = 0
        while place < len(data) and data[place]:
            length, space, _ = data[place : place + 20].partition(b" ")
            if not space or not length.isdigit() or int(length) <= len(length) + 1:
                self.fail(at, "a damaged extended header")
            key, _, value = data[place + len(length) + 1 : place + int(length)].rstrip(b"\n").partition(b"=")
            records[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
            place += int(length)
        return records

    def _size(self, text: str, at: int) -> int:
        if not text.isascii() or not text.isdigit() or len(text) > 20:
            self.fail(at, f"a size of {text[:40]!r}")
        return int(text)

    def check_padding(self, at: int) -> None:
        self.stream.seek(at)
        while chunk := self.stream.read(_PADDING_CHUNK):
            if chunk.strip(b"\0"):
                self.fail(at, "there is data after the end-of-archive block (tars joined with cat?)")
            at += len(chunk)
