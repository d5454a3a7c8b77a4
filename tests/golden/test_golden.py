"""A cache of format version 1 that is in the repository: today's reader reads it, today's writer writes its bytes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pytest
import torch

from pipelines.inspect.cache import check
from teacher_cache.errors import CacheError
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.reading.cached_samples import CachedSamples
from teacher_cache.shards.sealed import seal, unseal

FOLDER = Path(__file__).parent
GOLDEN = FOLDER / "cache"


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_golden", FOLDER / "make_golden.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tree(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_the_writer_writes_the_same_bytes(maker: ModuleType, tmp_path: Path) -> None:
    maker.make_golden(tmp_path / "cache")
    made, golden = tree(tmp_path / "cache"), tree(GOLDEN)
    tars = {name for name in golden if "/data/" in name}
    assert len(tars) == 3
    for name in (*tars, "manifest.json", "fields/response_topk/field.json", "fields/vision_hidden/field.json"):
        assert made[name] == golden[name], name
    created = (GOLDEN / "pyarrow-version").read_text().strip()
    if pa.__version__ == created:  # parquet bytes name the library that wrote them
        assert made == {name: data for name, data in golden.items() if name != "pyarrow-version"}


def test_the_reader_reads_it(maker: ModuleType) -> None:
    cache = TeacherCache(str(GOLDEN))
    rows = CachedSamples(cache, ["sft"], ["response_topk", "vision_hidden"])
    assert rows.counts == [maker.ROWS]
    for ordinal in range(maker.ROWS):
        row, made = rows.read(0, ordinal), maker.prepared(ordinal)
        said = maker.output(ordinal, len(made.vision_positions))
        assert row.sample == maker.sample(ordinal)
        assert (row.key, row.layout, row.text.image_at) == (made.key, made.layout, made.text.image_at)
        for name in ("ids", "role", "turn", "response"):
            assert torch.equal(getattr(row.text, name), getattr(made.text, name))
        topk = row.fields["response_topk"]
        assert torch.equal(topk.ids, said.topk["response"].ids)
        assert torch.equal(topk.log_tail, said.topk["response"].log_tail)
        gaps = topk.log_probs - topk.log_probs[:, :1]
        torch.testing.assert_close(gaps, said.topk["response"].log_probs - said.topk["response"].log_probs[:, :1])
        bound = said.hidden["vision"].abs().amax(dim=1, keepdim=True) / 254 + 1e-6
        assert ((row.fields["vision_hidden"] - said.hidden["vision"]).abs() <= bound).all()


def test_its_checksums_hold() -> None:
    problems = [p for p in check_without_teacher() if "processor" not in p.what and "head" not in p.what]
    assert problems == []


def check_without_teacher() -> list:
    cache = TeacherCache(str(GOLDEN))  # it holds no teacher: its fields come from integers
    return check(cache)


@pytest.mark.parametrize("name", ["manifest.json", "samples/commits/000000.json"])
def test_the_next_format_version_is_refused_by_name(copy_of, name: str) -> None:
    folder = copy_of(GOLDEN)
    body = unseal((folder / name).read_bytes(), "")
    (folder / name).write_bytes(seal({**body, "format_version": 2}))
    with pytest.raises(CacheError, match="format version '2'; this kdcli reads 1"):
        CachedSamples(TeacherCache(str(folder)), ["sft"], [])


def test_the_next_field_version_is_refused_by_name(copy_of) -> None:
    folder = copy_of(GOLDEN)
    file = folder / "fields" / "vision_hidden" / "field.json"
    file.write_bytes(seal({**unseal(file.read_bytes(), ""), "version": 2}))
    with pytest.raises(CacheError, match="field vision_hidden version 2 is not readable: this kdcli reads 1"):
        CachedSamples(TeacherCache(str(folder)), ["sft"], ["vision_hidden"])
    body = unseal(file.read_bytes(), "")
    params = {**body["params"], "codec_version": 3}
    file.write_bytes(seal({**body, "version": 1, "params": params}))
    with pytest.raises(CacheError, match="codec int8 version 3 is not readable"):
        CachedSamples(TeacherCache(str(folder)), ["sft"], ["vision_hidden"])


def test_it_is_small_and_plain_json() -> None:
    assert sum(map(len, tree(GOLDEN).values())) < 100_000
    assert json.loads((GOLDEN / "manifest.json").read_text())["format_version"] == 1
