"""Documents whose checksums are right and whose numbers are enormous: compared with one another and with limits before memory is taken."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.fuzz_targets import Folder, joined, shard_of, small_cache
from pipelines.inspect.cache import survey
from teacher_cache.codecs import container
from teacher_cache.errors import CacheError, KdcliError
from teacher_cache.planning.plan import MOST_SHARD_ROWS
from teacher_cache.planning.plan_file import parse_plan
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.reading.cached_samples import CachedSamples
from teacher_cache.records import SkipRecord
from teacher_cache.shards import plain_files
from teacher_cache.shards.commit import parse_commit
from teacher_cache.shards.index import SCHEMA, dump_index, parse_index
from teacher_cache.shards.plain_files import most_bytes
from teacher_cache.shards.sealed import MOST_VALUES, seal, unseal
from teacher_cache.shards.storage import Storage

MANY = 300_000_000
COMMIT = "samples/commits/000000.json"
MOST_KB = 600_000
"""KiB that a process takes at most: Python, torch and pyarrow are 400,000 of them."""


def resealed(name: str, **values: Any) -> bytes:
    return seal({**unseal(small_cache()[name], ""), **values})


def planned(rows: int, said: int | None = None) -> bytes:
    """A manifest whose one slice has so many rows, right in every checksum."""
    plan = parse_plan(small_cache()["manifest.json"], "")
    group = replace(plan.slices[0].groups[0], rows=rows)
    part = replace(plan.parts[0], rows=rows if said is None else said)
    return replace(plan, parts=(part,), slices=(replace(plan.slices[0], groups=(group,)),)).to_bytes()


def test_a_commit_counts_the_rows_of_the_plan() -> None:
    """3e8 rows in a commit alone; the index is never asked for."""
    folder = Folder()
    for column in ("samples", "fields/vision_hidden"):
        name = f"{column}/commits/000000.json"
        skipped = unseal(small_cache()[name], "")["skipped"]
        folder.write(name, resealed(name, rows=MANY, written=MANY - len(skipped)))
        with pytest.raises(CacheError, match="its commit counts 300,000,000 rows, the plan 2"):
            folder.read_all()
        assert "its commit counts 300,000,000 rows, the plan 2" in "\n".join(map(str, survey(str(folder.path))[1]))
        folder.write(name, small_cache()[name])
    folder.read_all()


@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        (planned(MANY), "a slice of 300,000,000 rows, at most 1,048,576 are read"),
        (planned(2, said=3), "part 'sft' has 3 rows, its slices have 2"),
        (planned(MOST_SHARD_ROWS + 1), "at most 1,048,576"),
    ],
)
def test_a_plan_whose_counts_cannot_be(manifest: bytes, said: str) -> None:
    with pytest.raises(CacheError, match=rf"here: damaged manifest .*{said}"):
        parse_plan(manifest, "here")


def test_a_row_is_skipped_once() -> None:
    skip = vars(SkipRecord("sft", 1, "", "", "no_answer", ""))
    with pytest.raises(CacheError, match="a row is skipped twice"):
        parse_commit(resealed(COMMIT, rows=3, skipped=[skip, skip]), "here")


def test_a_field_that_skips_more_than_there_is(tmp_path: Path) -> None:
    """Counts of rows never fall below 0, where the order of training would be of none."""
    folder, name = Folder(), "fields/vision_hidden/commits/000000.json"
    skips = [vars(SkipRecord("sft", ordinal, "", "", "no_answer", "")) for ordinal in (0, 5)]
    folder.write(name, resealed(name, written=0, skipped=skips))
    cache = TeacherCache(str(folder.path))
    with pytest.raises(CacheError, match="a field skips more rows than samples has"):
        CachedSamples(cache, cache.parts(), ["vision_hidden"])


def test_a_document_of_too_many_values() -> None:
    with pytest.raises(CacheError, match=f"here: .*at most {MOST_VALUES:,} are read"):
        unseal(b"[" + b"{}," * MOST_VALUES + b"{}]", "here")


def test_a_document_that_says_two_things() -> None:
    """Other readers take the first: its checksum is right for both."""
    whole = small_cache()[COMMIT]
    with pytest.raises(CacheError, match=r"here: .*a key occurs twice"):
        unseal(whole.replace(b"{", b'{"rows": 7, ', 1), "here")


def test_more_parts_and_totals_than_anybody_names() -> None:
    """What is done once a part, or once a total, ends."""
    part = unseal(small_cache()["manifest.json"], "")["parts"][0]
    with pytest.raises(CacheError, match="4,097 parts, at most 4,096 are read"):
        parse_plan(resealed("manifest.json", parts=[part] * 4097), "here")
    with pytest.raises(CacheError, match="1,001 totals, at most 1,000 are read"):
        parse_commit(resealed(COMMIT, counts={str(one): 1 for one in range(1001)}), "here")


def test_a_header_that_claims_more_than_it_is() -> None:
    for length in (1 << 40, container.MOST_HEADER + 1, (1 << 64) - 1):
        for read in (container.unpack, lambda data, place: container.said_bytes(data)):
            with pytest.raises(CacheError, match="header of"):
                read(length.to_bytes(8, "little") + b"{}" * 99, "here")


def test_a_sample_longer_than_any(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sparse tar, and an index whose member is all of it."""
    monkeypatch.setattr("teacher_cache.shards.reader.MOST_SAMPLE", 1 << 16)
    commit, _, index = shard_of("samples")
    (entry,) = parse_index(index, "", commit.tar_bytes, commit.written)
    huge = replace(entry, members=(replace(entry.members[0], offset=0, size=1 << 17),))
    folder = Folder()
    folder.write_shard("samples", joined(b"\0" * (1 << 17), dump_index([huge])))
    with pytest.raises(CacheError, match="has more than 65,536 bytes"):
        folder.read_all()


def many_rows(rows: int) -> bytes:
    """An index of a few bytes a thousand rows: all values are one."""
    one = pa.array(np.zeros(rows, np.int64))
    narrow = one.cast(pa.int32())
    members = pa.StructArray.from_arrays(
        [pa.array(["x"] * rows), one, one, narrow.cast(pa.uint32())], names=["ext", "offset", "size", "crc32"]
    )
    listed = pa.ListArray.from_arrays(pa.array(np.arange(rows + 1), pa.int32()), members)
    every = [pa.array(["k"] * rows), one, narrow, narrow, narrow, listed]
    stream = pa.BufferOutputStream()
    pq.write_table(pa.table(every, names=SCHEMA.names), stream, compression="zstd")
    return stream.getvalue().to_pybytes()


def test_an_index_that_unpacks_to_more_than_its_footer_says(monkeypatch: pytest.MonkeyPatch) -> None:
    data = many_rows(20_000)
    monkeypatch.setattr("teacher_cache.shards.index.MOST_BYTES", len(data) * 2 + (1 << 18))
    with pytest.raises(CacheError, match=r"here: damaged index \(more than"):
        parse_index(data, "here", 1 << 40, 20_000)


def test_indices_in_memory_are_bounded_together(monkeypatch: pytest.MonkeyPatch, tiny_cache: Path) -> None:
    monkeypatch.setattr("teacher_cache.shards.reader.MOST_KEPT_ROWS", 10)
    column = TeacherCache(str(tiny_cache)).column("samples")
    for shard in range(5):
        assert len(column.entries(shard)) > 1
    assert sum(map(len, column._entries.values())) <= max(10, len(column.entries(4)))


SPARSE = (
    "manifest.json",
    COMMIT,
    "teacher/0/calibration/vision_hidden.safetensors",
)


def sparse(name: str) -> tuple[Folder, Path]:
    """(cache, file of it): 30 GB of nothing in its place."""
    folder = Folder()
    file = folder.path / name
    file = next(file.iterdir()) if file.is_dir() else file
    file.parent.mkdir(exist_ok=True)
    file.touch()
    os.truncate(file, 30 << 30)
    return folder, file


def test_a_sparse_file_takes_no_memory() -> None:
    """One of each kind, each in a cache of its own, read by a process that may not have so much."""
    places = [sparse(name) for name in (*SPARSE, "samples/index")]
    code = (
        "import sys\n"
        "from pipelines.inspect.cache import survey, status\n"
        "from teacher_cache.reading.cache import TeacherCache\n"
        "from teacher_cache.reading.cached_samples import CachedSamples\n"
        "from teacher_cache.errors import KdcliError\n"
        "for read in (survey, lambda url: status(TeacherCache(url)), lambda url: [CachedSamples(c, c.parts(), [*c.fields]).read(0, 0) "
        "for c in [TeacherCache(url)]]):\n"
        "    for url in sys.argv[1:]:\n"
        "        try:\n            read(url)\n        except KdcliError as error:\n            print(error)\n"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))\n"  # ru_maxrss begins with ours
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *(str(folder.path) for folder, _ in places)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    *said, peak = done.stdout.splitlines()
    assert int(peak) < MOST_KB, f"{peak} KiB"
    assert all(file.name in "\n".join(said) for _, file in places), done.stdout


def test_a_store_is_not_believed_either(monkeypatch: pytest.MonkeyPatch) -> None:
    """One byte more than the limit is asked for, whatever the object's size is."""
    fs = Storage("memory://counts").fs
    monkeypatch.setattr(plain_files, "MOST_COMMIT", 1000)
    for size, fits in ((1000, True), (1001, False), (1 << 22, False)):
        fs.pipe_file("/counts/samples/commits/000000.json", b"x" * size)
        asked: list[int] = []
        real = fs.cat_ranges

        def counted(paths: Any, starts: Any, ends: Any, real: Callable[..., Any] = real, **more: Any) -> Any:
            found = real(paths, starts, ends, **more)
            asked.extend(map(len, found))  # noqa: B023
            return found

        monkeypatch.setattr(fs, "cat_ranges", counted)
        try:
            assert len(Storage("memory://counts").read(COMMIT)) == size and fits
        except KdcliError as error:
            assert not fits and "more than 1,000 bytes" in str(error)
        assert max(asked) <= 1001
        monkeypatch.setattr(fs, "cat_ranges", real)


def test_every_file_of_a_cache_has_a_limit(tiny_cache: Path, tiny_cache_standard: Path) -> None:
    """Real ones are far below it."""
    for cache in (tiny_cache, tiny_cache_standard):
        for file in (one for one in cache.rglob("*") if one.is_file() and "/data/" not in str(one)):
            assert file.stat().st_size < most_bytes(str(file.relative_to(cache))) / 10
