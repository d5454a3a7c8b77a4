"""Write an existing, damaged shard once more: its files are replaced by bytes that its commit promised, by others never.

Each replacement is one whole file in one atomic step, and the commit comes last: whenever the process dies, the shard is as damaged as it
was or less, and whole only when it is.
"""

from __future__ import annotations

from teacher_cache.errors import CacheError
from teacher_cache.shards.commit import Commit, read_commit
from teacher_cache.shards.plain_files import StrangeFile
from teacher_cache.shards.writer import ShardWriter


class ShardMender(ShardWriter):
    """A ``ShardWriter`` whose ``commit`` replaces what is damaged. A shard that was never committed is simply committed.

    What was written again must be what stood there: by the commit where that can be read, else by the hashes in the names of tar and
    index, or in what is left of the commit. Where it is not, nothing changes.
    """

    any_bytes = False

    def commit(self) -> Commit:
        """Returns what was written again, whether or not it was taken."""
        commit, index = self._close()
        standing = self._standing()
        if standing is None and not self.storage.exists(self._commit_path):
            self._put(commit, index)
            self.storage.put_new(self._commit_path, commit.to_bytes())
        elif self.any_bytes or self._is_the_same(commit, standing):
            self._put(commit, index)
            if standing is None or not _same_files(commit, standing):
                self.storage.put_bytes(commit.to_bytes(), self._commit_path)
        else:
            self._draft.unlink()
        return commit

    def _standing(self) -> Commit | None:
        """The commit that stands, where it can be read and is of this plan and field."""
        try:
            commit = read_commit(self.storage, self.column, self.shard)
        except CacheError:
            return None
        return commit if (commit.plan_hash, commit.column_hash) == self._hashes else None

    def _is_the_same(self, commit: Commit, standing: Commit | None) -> bool:
        if standing is not None:
            return _same_files(commit, standing)
        try:
            left = self.storage.read(self._commit_path)
        except StrangeFile:
            left = b""
        return all(
            digest.encode() in left or name in self.storage.names(f"{self.column}/{folder}")
            for folder, name, digest in (
                ("data", commit.tar, commit.tar_sha256),
                ("index", commit.index, commit.index_sha256),
            )
        )


class ShardReplacer(ShardMender):
    """Takes other bytes too, as a machine of another kind makes them; what stood there is garbage then."""

    any_bytes = True


def _same_files(one: Commit, other: Commit) -> bool:
    return (one.tar_sha256, one.index_sha256) == (other.tar_sha256, other.index_sha256)
