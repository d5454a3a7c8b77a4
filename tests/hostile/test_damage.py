"""Bit flips and truncations anywhere in a cache: verify names them, and the reader never hands out other bytes than were written."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipelines.inspect.cache import check
from teacher_cache.errors import KdcliError
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.reading.cached_samples import CachedSample, CachedSamples
from tests.close import equal_tensors
from tests.exhaustive import of_all

FIELDS = ["affinity", "attention", "relation", "response_hidden", "response_topk", "vision_hidden", "vision_topk"]


def leaves(value: object) -> Iterator[object]:
    """Tensors and plain values of a decoded row, in order."""
    if isinstance(value, torch.Tensor) or not hasattr(value, "__dict__"):
        yield value
    else:
        for inner in vars(value).values():
            yield from leaves(inner)


def same(a: CachedSample, b: CachedSample) -> bool:
    def equal(x: object, y: object) -> bool:
        if isinstance(x, torch.Tensor):
            return isinstance(y, torch.Tensor) and x.dtype == y.dtype and equal_tensors(x, y)
        return bool(x == y)

    parts = [(a.key, b.key), (a.sample, b.sample), (a.layout, b.layout)]
    parts += list(zip(leaves(a.text), leaves(b.text)))
    parts += [pair for name in FIELDS for pair in zip(leaves(a.fields[name]), leaves(b.fields[name]))]
    return all(equal(x, y) for x, y in parts)


def read_all(folder: Path) -> list[CachedSample]:
    cache = TeacherCache(str(folder))
    rows = CachedSamples(cache, cache.parts(), FIELDS)
    return [rows.read(p, r) for p, count in enumerate(rows.counts) for r in range(count)]


def is_noticed(folder: Path) -> bool:
    try:
        return bool(check(TeacherCache(str(folder))))
    except KdcliError:
        return True


@pytest.fixture(scope="module")
def mini_cache(make_request, mixture, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rows of each part in two shards: small, since it is read whole for every damage."""
    from pipelines.capture.cache_teacher import capture

    out = tmp_path_factory.mktemp("caches") / "mini"
    capture(make_request(out, data=[replace(part, limit=2) for part in mixture], shards=4, fields=tuple(FIELDS)))
    return out


@pytest.fixture(scope="module")
def original(mini_cache: Path) -> list[CachedSample]:
    return read_all(mini_cache)


def damages(folder: Path, count: int, seed: int) -> Iterator[tuple[str, Path, bytes]]:
    """(what, file, its damaged content), files of every kind in turn."""
    rng = random.Random(seed)
    kinds = [
        "manifest.json",
        "fields/*/field.json",
        "*/commits/*",
        "fields/*/commits/*",
        "**/index/*",
        "**/data/*",
        "teacher/**/*.*",
    ]
    for i in range(count):
        file = rng.choice(sorted(folder.glob(kinds[i % len(kinds)])))
        data = bytearray(file.read_bytes())
        if i % 5 == 4:
            length = rng.randrange(len(data))
            yield f"{file.relative_to(folder)} cut to {length} bytes", file, bytes(data[:length])
        else:
            at, bit = rng.randrange(len(data)), rng.randrange(8)
            data[at] ^= 1 << bit
            yield f"{file.relative_to(folder)} byte {at} bit {bit}", file, bytes(data)


def test_a_whole_cache_is_clean(mini_cache: Path, original: list[CachedSample]) -> None:
    assert check(TeacherCache(str(mini_cache))) == []
    assert len(original) == 4
    assert all(same(a, b) for a, b in zip(original, read_all(mini_cache)))


@pytest.mark.parametrize("seed", of_all(range(3), 0))
def test_damage_is_noticed_and_never_read(mini_cache: Path, copy_of, original: list[CachedSample], seed: int) -> None:
    folder = copy_of(mini_cache)
    for what, file, damaged in damages(folder, 70, seed):
        whole = file.read_bytes()
        file.write_bytes(damaged)
        assert is_noticed(folder), f"verify does not notice: {what}"
        try:
            rows = read_all(folder)
        except KdcliError:
            pass
        else:  # the damage lies where no row is: padding of a tar, the head
            assert all(same(a, b) for a, b in zip(original, rows)), f"the reader returned damaged data: {what}"
            assert len(rows) == len(original), f"rows are missing: {what}"
        file.write_bytes(whole)


@pytest.mark.parametrize("which", of_all(["one of a column", "every"], "one of a column"))
@pytest.mark.parametrize("kind", ["*/data/*", "*/index/*", "*/commits/*", "fields/*/field.json", "manifest.json"])
def test_a_missing_file_is_noticed(mini_cache: Path, copy_of, kind: str, which: str) -> None:
    folder, rng = copy_of(mini_cache), random.Random(5)
    files = rng.sample(found := sorted({*folder.glob(kind), *folder.glob(f"fields/{kind}")}), len(found))
    for file in files if which == "every" else {one.parent: one for one in files}.values():
        whole = file.read_bytes()
        file.unlink()
        assert is_noticed(folder), file
        with pytest.raises(KdcliError):
            read_all(folder)
        file.write_bytes(whole)


def test_files_of_two_shards_exchanged(mini_cache: Path, copy_of) -> None:
    for folder_name in ("samples/commits", "fields/vision_hidden/commits", "samples/index", "samples/data"):
        folder = copy_of(mini_cache)
        first, second, *_ = sorted((folder / folder_name).iterdir())
        spare = folder / "spare"
        shutil.move(first, spare)
        shutil.move(second, first)
        shutil.move(spare, second)
        assert is_noticed(folder), folder_name
        with pytest.raises(KdcliError):
            read_all(folder)
