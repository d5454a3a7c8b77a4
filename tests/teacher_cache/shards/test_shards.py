"""Tars that any tool opens, an index that is exact, commits of which the first wins."""

from __future__ import annotations

import io
import os
import pickle
import random
import tarfile
import threading
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import webdataset

from teacher_cache.errors import CacheError
from teacher_cache.reading.verify import orphans, verify
from teacher_cache.shards import writer as writer_module
from teacher_cache.shards.commit import committed_shards, read_commit
from teacher_cache.shards.index import Entry, dump_index, parse_index
from teacher_cache.shards.reader import ColumnReader
from teacher_cache.shards.storage import Storage
from teacher_cache.shards.writer import ShardWriter

COLUMNS = {"samples": "", "fields/x": "h"}
EXTENSIONS = ("json", "tokens.safetensors", "0.jpg")


def payload(ordinal: int, ext: str) -> bytes:
    return random.Random(f"{ordinal}.{ext}").randbytes(20 + 300 * (ordinal % 3))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_the_webdataset_library_reads_a_column(small_cache: Storage) -> None:
    tar = small_cache.path(f"samples/data/{read_commit(small_cache, 'samples', 0).tar}")
    read = list(webdataset.WebDataset(tar, shardshuffle=False, empty_check=False))
    assert [row["__key__"] for row in read] == [f"{i:09d}-{i:08x}" for i in range(6)]
    for i, row in enumerate(read):
        assert {ext: row[ext] for ext in EXTENSIONS} == {ext: payload(i, ext) for ext in EXTENSIONS}


def test_two_columns_zip_by_key(small_cache: Storage) -> None:
    tars = [small_cache.path(f"{c}/data/{read_commit(small_cache, c, 1).tar}") for c in COLUMNS]
    samples, field = [list(webdataset.WebDataset(tar, shardshuffle=False, empty_check=False)) for tar in tars]
    assert [row["__key__"] for row in samples] == [row["__key__"] for row in field]
    assert len(samples) == 6


def test_tarfile_reads_it_and_owner_and_time_are_fixed(small_cache: Storage) -> None:
    commit = read_commit(small_cache, "samples", 0)
    with tarfile.open(small_cache.path(f"samples/data/{commit.tar}")) as tar:
        members = tar.getmembers()
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}
        contents = {m.name: tar.extractfile(m).read() for m in members}
    assert contents == {f"{i:09d}-{i:08x}.{ext}": payload(i, ext) for i in range(6) for ext in EXTENSIONS}


def test_index_offsets_are_exact(small_cache: Storage) -> None:
    commit = read_commit(small_cache, "samples", 1)
    tar = Path(small_cache.path(f"samples/data/{commit.tar}")).read_bytes()
    entries = parse_index(small_cache.read(f"samples/index/{commit.index}"), "index", commit.tar_bytes, commit.written)
    for ordinal, entry in enumerate(entries, start=7):
        assert entry.ordinal == ordinal
        for member in entry.members:
            assert tar[member.offset : member.offset + member.size] == payload(ordinal, member.ext)


def test_reader_returns_what_was_written(small_cache: Storage, small_plan) -> None:
    reader = ColumnReader(small_cache, "samples", small_plan.plan_hash, "")
    for shard in (1, 0):
        for row in (5, 0, 3):
            assert reader.read(shard, row) == {ext: payload(7 * shard + row, ext) for ext in EXTENSIONS}


def test_many_open_tars_are_closed_again(small_cache: Storage, small_plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teacher_cache.shards.reader.OPEN_SHARDS", 1)
    reader = ColumnReader(small_cache, "samples", small_plan.plan_hash, "")
    for shard in (0, 1, 0, 1):
        assert reader.read(shard, 2)["0.jpg"] == payload(7 * shard + 2, "0.jpg")
        assert len(reader._open) == 1


def test_the_same_content_is_the_same_bytes(small_cache: Storage, tmp_path: Path, small_plan, write_shard) -> None:
    from teacher_cache.planning.plan_file import write_plan

    again = Storage(tmp_path / "again")
    write_plan(again, small_plan)
    for shard in (1, 0):
        write_shard(again, "fields/x", shard, column_hash="h")
        write_shard(again, "samples", shard)
    assert tree(Path(again.root)) == tree(Path(small_cache.root))


def test_counts_and_rows_of_a_commit(small_cache: Storage) -> None:
    commit = read_commit(small_cache, "samples", 0)
    entries = parse_index(small_cache.read(f"samples/index/{commit.index}"), "index", commit.tar_bytes, commit.written)
    assert (commit.rows, commit.written, [s.ordinal for s in commit.skipped]) == (7, 6, [6])
    for name in ("vision_rows", "response_rows", "text_tokens"):
        assert commit.counts[name] == sum(getattr(entry, name) for entry in entries)
    assert committed_shards(small_cache, "samples") == [0, 1]


def test_a_shard_of_skips_alone(tmp_path: Path) -> None:
    from teacher_cache.records import SkipRecord

    storage = Storage(tmp_path / "c")
    writer = ShardWriter(storage, "samples", 0, "p", "")
    writer.skip(SkipRecord("sft", 0, "", "row 0", "no_answer", ""))
    commit = writer.commit()
    assert (commit.rows, commit.written) == (1, 0)
    assert list(ColumnReader(storage, "samples", "p", "").entries(0)) == []


def test_racing_writers_leave_one_consistent_shard(
    small_cache: Storage, small_plan, write_shard, tmp_path: Path
) -> None:
    """Two machines, whose floats differ, write the same shard at the same time, many times over."""
    from teacher_cache.planning.plan_file import write_plan

    for attempt in range(20):
        storage = Storage(tmp_path / f"race-{attempt}")
        write_plan(storage, small_plan)
        barrier = threading.Barrier(3)
        commits = [None] * 3

        def write(i: int, storage=storage, barrier=barrier, commits=commits) -> None:
            barrier.wait()
            commits[i] = write_shard(storage, "samples", 0, salt=bytes([i]))

        threads = [threading.Thread(target=write, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert commits[0] == commits[1] == commits[2] == read_commit(storage, "samples", 0)
        assert verify(storage, {"samples": ""}) == []
        left = orphans(storage, {"samples": ""})
        assert len(left) == 4, left  # tar and index of the two that came second
        reader = ColumnReader(storage, "samples", small_plan.plan_hash, "")
        salts = {reader.read(0, row)[ext][-1] for row in range(6) for ext in EXTENSIONS}
        assert len(salts) == 1


def test_a_second_writer_with_another_pyarrow_changes_nothing(
    small_cache: Storage, small_plan, write_shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same tar but other parquet bytes: the index of the first commit must not be replaced."""

    def uncompressed(entries) -> bytes:
        buffer = io.BytesIO()
        pq.write_table(pq.read_table(io.BytesIO(dump_index(entries))), buffer, compression="none")
        return buffer.getvalue()

    monkeypatch.setattr(writer_module, "dump_index", uncompressed)
    before = read_commit(small_cache, "samples", 0)
    assert write_shard(small_cache, "samples", 0) == before
    assert verify(small_cache, COLUMNS) == []


def test_a_killed_writer_leaves_orphans_only(small_cache: Storage, small_plan) -> None:
    from teacher_cache.records import SkipRecord

    before = tree(Path(small_cache.root))
    writer = ShardWriter(small_cache, "samples", 1, small_plan.plan_hash, "")
    writer.skip(SkipRecord("sft", 0, "", "", "no_answer", ""))
    assert [name.split("/")[0] for name in orphans(small_cache, COLUMNS)] == [".staging"]
    writer.abandon()
    assert tree(Path(small_cache.root)) == before
    assert orphans(small_cache, COLUMNS) == []


def test_drafts_of_killed_documents_are_orphans(small_cache: Storage) -> None:
    """By names that kdcli gives; what anybody else put there stays."""
    draft = "0f" * 16
    drafts = [
        f".manifest.json.{draft}",
        f"fields/x/.field.json.{draft}",
        f"samples/commits/.000001.json.{draft}",
        f"teacher/ab/.head.json.{draft}",
        f".staging/{draft}-manifest.json",
        f".staging/fields-x-000003-{draft}.tar",
        f"samples/data/.000000-01c01c56.tar.{draft}",  # on its way to another disk
    ]
    others = [
        ".staging/notes",
        "samples/data/.DS_Store",
        "samples/data/000000.tar.bak",
        ".my.json.1",
        "samples/index/x",
    ]
    for name in (*drafts, *others):
        Path(small_cache.path(name)).parent.mkdir(parents=True, exist_ok=True)
        Path(small_cache.path(name)).write_bytes(b"")
    assert sorted(orphans(small_cache, COLUMNS)) == sorted(drafts)
    assert verify(small_cache, COLUMNS) == []
    assert committed_shards(small_cache, "samples") == [0, 1]


def test_put_new_never_replaces(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    assert storage.put_new("a/b.json", b"first")
    assert not storage.put_new("a/b.json", b"second")
    assert storage.read("a/b.json") == b"first"
    assert os.listdir(tmp_path / "a") == ["b.json"]


def test_storage_travels_to_other_processes(small_cache: Storage, small_plan) -> None:
    reader = ColumnReader(small_cache, "samples", small_plan.plan_hash, "")
    reader.read(0, 0)
    assert pickle.loads(pickle.dumps(reader)).read(1, 1)["json"] == payload(8, "json")


def test_a_memory_url_is_a_cache_too(small_plan, write_shard) -> None:
    from teacher_cache.planning.plan_file import read_plan, write_plan

    storage = Storage("memory://kdcli-test/cache")
    write_plan(storage, small_plan)
    assert read_plan(storage).plan_hash == small_plan.plan_hash
    first = write_shard(storage, "samples", 0)
    assert write_shard(storage, "samples", 0, salt=b"other") == first
    write_plan(storage, small_plan)
    assert verify(storage, {"samples": ""}) == []
    assert ColumnReader(storage, "samples", small_plan.plan_hash, "").read(0, 4)["0.jpg"] == payload(4, "0.jpg")
    assert committed_shards(storage, "samples") == [0]


def test_a_commit_of_another_plan_or_field_is_refused(small_cache: Storage, small_plan) -> None:
    for hashes in (("other", ""), (small_plan.plan_hash, "other")):
        with pytest.raises(CacheError, match="another plan or field setting"):
            ColumnReader(small_cache, "samples", *hashes).read(0, 0)
    assert "another plan" in str(verify(small_cache, {"fields/x": "g"})[0])


def test_an_uncommitted_shard_says_so(small_cache: Storage, small_plan) -> None:
    with pytest.raises(CacheError, match="not committed: run `kdcli cache-teacher`"):
        ColumnReader(small_cache, "samples", small_plan.plan_hash, "").read(7, 0)


@pytest.mark.parametrize("folder", ["data", "index"])
def test_missing_files_are_named(small_cache: Storage, small_plan, folder: str) -> None:
    (name,) = [n for n in small_cache.names(f"fields/x/{folder}") if n.startswith("000000")]
    os.remove(small_cache.path(f"fields/x/{folder}/{name}"))
    with pytest.raises(CacheError, match="missing"):
        ColumnReader(small_cache, "fields/x", small_plan.plan_hash, "h").read(0, 0)
    (problem,) = verify(small_cache, COLUMNS)
    assert (problem.column, problem.shard) == ("fields/x", 0)
    assert "missing" in problem.what


def test_indices_of_many_shards_are_not_all_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a loader process holds does not grow with the rows of the cache."""
    monkeypatch.setattr("teacher_cache.shards.reader.OPEN_SHARDS", 2)
    storage = Storage(tmp_path / "c")
    for shard in range(4):
        writer = ShardWriter(storage, "samples", shard, "p", "")
        writer.copy(Entry(f"{shard:09d}-aa", shard, 1, 2, 3), {"json": b"{}", "0.png": bytes([shard])})
        writer.commit()
    reader = ColumnReader(storage, "samples", "p", "")
    for shard in (0, 1, 2, 3, 0):
        (entry,) = reader.entries(shard)
        assert (entry.key, entry.ordinal, [m.ext for m in entry.members]) == (
            f"{shard:09d}-aa",
            shard,
            ["json", "0.png"],
        )
        assert reader.read(shard, 0)["0.png"] == bytes([shard]) and reader.entries(shard)[-1] == entry
        assert len(reader._entries) <= 2
