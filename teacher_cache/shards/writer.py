"""Write one shard of one column: tar → index → commit. Nothing is visible before the commit; a kill leaves only orphans.

Tars are plain USTAR with mtime 0 and fixed owner and order, so the same content is the same bytes; both files are named by
their content's hash, so two writers of one shard can never mix: the first commit wins, whatever the other leaves is an orphan.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
import uuid
import zlib
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from teacher_cache.records import Prepared, SkipRecord
from teacher_cache.shards import staging
from teacher_cache.shards.commit import Commit, read_commit
from teacher_cache.shards.index import Entry, TarMember, dump_index
from teacher_cache.shards.storage import Storage


class _Summed:
    """A new file that is written from front to back, summed as it grows: nobody waits at its end for it to be read again."""

    def __init__(self, path: Path):
        self._file, self.sha256 = path.open("wb"), hashlib.sha256()
        self.tell, self.close, self.fileno = self._file.tell, self._file.close, self._file.fileno

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return self._file.write(data)


class ShardWriter:
    """One tar under construction.

    Args:
        storage: the cache. column: ``samples`` or ``fields/NAME``. shard: slice number.
        plan_hash, column_hash: bound into the commit.
        staging_bytes: most bytes that a process's unfinished tars take on the local disk, where the cache is in an object store; 0: any.
    """

    def __init__(
        self, storage: Storage, column: str, shard: int, plan_hash: str, column_hash: str, staging_bytes: int = 0
    ):
        self.storage, self.column, self.shard = storage, column, shard
        self._hashes = (plan_hash, column_hash)
        self._folder = storage.staging()
        self._bound = 0 if storage.local else staging_bytes
        staging.check_room(self._folder, self._bound)
        self._draft = self._folder / f"{column.replace('/', '-')}-{shard:06d}-{uuid.uuid4().hex}.tar"
        # One extra handle on the same file gives exact member offsets without trusting tarfile's buffering.
        self._file = _Summed(self._draft)
        self._tar = tarfile.open(fileobj=cast(Any, self._file), mode="w", format=tarfile.USTAR_FORMAT)
        self._entries: list[Entry] = []
        self._skipped: list[SkipRecord] = []
        self._counts: Counter[str] = Counter()
        self.tar_sha256 = ""
        """Of what was written, once it is committed."""

    def add(self, prepared: Prepared, members: dict[str, bytes]) -> None:
        """Append one sample; ``members`` maps extension → content, written in the given order."""
        ordinal = int(prepared.key.split("-")[0])
        vision, response, text = prepared.vision_positions, prepared.response_rows, prepared.text.ids
        self._add(Entry(prepared.key, ordinal, len(vision), len(response), len(text)), members)

    def copy(self, entry: Entry, members: dict[str, bytes]) -> None:
        """Append a sample of another tar as it is; same samples in the same order give the same tar."""
        self._add(entry, members)

    def _add(self, entry: Entry, members: dict[str, bytes]) -> None:
        with staging.told_when_full(self._folder):
            stored = tuple(self._append(entry.key, ext, content) for ext, content in members.items())
        self._counts.update({name: getattr(entry, name) for name in ("vision_rows", "response_rows", "text_tokens")})
        self._entries.append(replace(entry, members=stored))

    def count(self, counts: Mapping[str, int]) -> None:
        """Add to the commit's totals what a sample's index entry does not say."""
        self._counts.update(counts)

    def check_staging(self) -> None:
        """CacheError where the tars under construction take more local disk than they may."""
        staging.check_bound(self._folder, self._bound)

    def skip(self, record: SkipRecord) -> None:
        self._skipped.append(record)

    def _append(self, key: str, ext: str, content: bytes) -> TarMember:
        info = tarfile.TarInfo(f"{key}.{ext}")
        info.size = len(content)
        info.mode = 0o644
        offset = self._tar.offset + tarfile.BLOCKSIZE
        self._tar.addfile(info, io.BytesIO(content))
        return TarMember(ext, offset, len(content), zlib.crc32(content))

    def commit(self) -> Commit:
        """Close the tar and make the shard visible. Returns the commit that stands, ours or an earlier equal-plan one."""
        with staging.told_when_full(self._folder):
            commit, index = self._close()
            self._put(commit, index)
        if not self.storage.put_new(self._commit_path, commit.to_bytes()):
            return read_commit(self.storage, self.column, self.shard)
        return commit

    @property
    def _commit_path(self) -> str:
        return f"{self.column}/commits/{self.shard:06d}.json"

    def _close(self) -> tuple[Commit, bytes]:
        """The commit that says what was written, and the index's bytes; the tar is still a draft."""
        self._tar.close()
        self._file.close()
        staging.check_bound(self._folder, self._bound)
        self.tar_sha256 = digest = self._file.sha256.hexdigest()
        stem = f"{self.shard:06d}-{digest[:8]}"
        index = dump_index(self._entries)
        index_digest = hashlib.sha256(index).hexdigest()
        commit = Commit(
            shard=self.shard,
            plan_hash=self._hashes[0],
            column_hash=self._hashes[1],
            tar=f"{stem}.tar",
            tar_bytes=self._draft.stat().st_size,
            tar_sha256=digest,
            # By its own hash too: another pyarrow writes other bytes, and must not replace the index of an earlier commit.
            index=f"{stem}-{index_digest[:8]}.parquet",
            index_sha256=index_digest,
            rows=len(self._entries) + len(self._skipped),
            written=len(self._entries),
            skipped=tuple(sorted(self._skipped, key=lambda skip: skip.ordinal)),
            counts=dict(self._counts),
        )
        return commit, index

    def _put(self, commit: Commit, index: bytes) -> None:
        self.storage.put_file(self._draft, f"{self.column}/data/{commit.tar}")
        self.storage.put_bytes(index, f"{self.column}/index/{commit.index}")

    def abandon(self) -> None:
        """Drop the draft, after an error."""
        for one in (self._tar, self._file):
            with suppress(OSError):  # the disk may be full, and closing writes
                one.close()
        self._draft.unlink(missing_ok=True)
