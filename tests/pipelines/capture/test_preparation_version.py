"""A cache that an older kdcli began is read, finished, repaired and grown as it was begun; one of a later kdcli is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch

from pipelines.capture.cache_teacher import capture
from pipelines.edit.fields import add_fields
from pipelines.edit.repair import RepairRequest, repair
from pipelines.judge.fidelity.rows import capture_preparer
from teacher_cache.errors import CompatibilityError
from teacher_cache.preparing.fingerprint import PREPARATION, preparation_version
from teacher_cache.preparing.prepare import Preparer
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.reading.cached_samples import CachedSamples
from teacher_cache.sources import DataSpec
from teacher_cache.teachers.vllm_answers import prompt_of
from tests.golden.test_golden import GOLDEN

TOPK = {"k": 8, "step": 2.0**-12}


@pytest.fixture(scope="module")
def lying(tmp_path_factory: pytest.TempPathFactory) -> DataSpec:
    """Rows whose pictures lie on their side and say so: 64×32 pixels as stored, 32×64 as shown."""
    folder = tmp_path_factory.mktemp("lying")
    rows = []
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    for number in range(4):
        PIL.Image.effect_noise((64, 32), 50 + number).convert("RGB").save(folder / f"{number}.jpg", exif=exif)
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A red square."}]
        rows.append({"id": str(number), "image": f"{number}.jpg", "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(rows))
    return DataSpec("sft", str(folder / "rows.json"), image_root=str(folder))


@pytest.fixture(scope="module")
def request_of(make_request: Any, lying: DataSpec) -> Any:
    """``request_of(out, version)``: one field over the lying pictures."""

    def make(out: Path, version: int = PREPARATION, **settings: Any) -> Any:
        small = {"data": [lying], "shards": 2, "fields": ("vision_hidden",), **settings}
        return replace(make_request(out, **small), version=version)

    return make


@pytest.fixture(scope="module")
def old(request_of: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of preparation version 1."""
    out = tmp_path_factory.mktemp("old") / "cache"
    capture(request_of(out, version=1))
    return out


def sizes(folder: Path) -> set[tuple[int, int]]:
    rows = CachedSamples(TeacherCache(str(folder)), ["sft"], [])
    return {rows.read(shard, row).layout[0].size for shard, count in enumerate(rows.counts) for row in range(count)}


def test_old_caches_have_no_number_and_new_ones_have(old: Path, request_of: Any, tmp_path: Path) -> None:
    capture(request_of(tmp_path / "new"))
    new = TeacherCache(str(tmp_path / "new")).plan.preparation
    there = TeacherCache(str(old)).plan.preparation
    assert "version" not in there and preparation_version(there) == 1
    assert preparation_version(TeacherCache(str(GOLDEN)).plan.preparation) == 1
    assert new["version"] == PREPARATION and preparation_version(new) == PREPARATION
    assert (sizes(old), sizes(tmp_path / "new")) == ({(64, 32)}, {(32, 64)})


def test_an_old_cache_is_prepared_as_it_was(old: Path, teacher_parts: Any) -> None:
    """By whatever reads it: what a student, vLLM and a comparison see are the stored pixels."""
    cache = TeacherCache(str(old))
    row = CachedSamples(cache, ["sft"], []).read(0, 0)
    preparers = [capture_preparer(cache, *teacher_parts), Preparer.like(cache.plan.preparation, *teacher_parts)]
    new = Preparer(*teacher_parts).prepare(row.sample)
    for preparer in preparers:
        made = preparer.prepare(row.sample)
        assert made.layout == row.layout != new.layout
        assert torch.equal(made.text.ids, row.text.ids)
        assert not torch.equal(made.pixels["pixel_values"], new.pixels["pixel_values"])
        assert prompt_of(made, preparer.image_token_id)["multi_modal_data"]["image"][0].size == (64, 32)
    assert prompt_of(new, preparers[0].image_token_id)["multi_modal_data"]["image"][0].size == (32, 64)


def test_an_old_capture_is_finished_as_it_was_begun(request_of: Any, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    capture(replace(request_of(out, version=1), part_of_shards=(0, 2)))
    assert capture(request_of(out))["columns"]["samples"]["rows"] == 4
    assert sizes(out) == {(64, 32)} and "version" not in TeacherCache(str(out)).plan.preparation


def test_an_old_cache_grows(old: Path, request_of: Any, copy_of: Any) -> None:
    folder = copy_of(old)
    made = request_of(folder)
    add_fields(str(folder), made.teacher, {"vision_topk": TOPK}, replace(made.settings, parts_without_fields=()))
    rows = CachedSamples(TeacherCache(str(folder)), ["sft"], ["vision_topk", "vision_hidden"])
    assert all(set(rows.read(0, row).fields) == {"vision_topk", "vision_hidden"} for row in range(rows.counts[0]))


@pytest.mark.parametrize("what", ["manifest.json", "samples"])
def test_an_old_cache_is_repaired(old: Path, request_of: Any, lying: DataSpec, copy_of: Any, what: str) -> None:
    folder = copy_of(old)
    before = {file.name: file.read_bytes() for file in sorted((folder / "samples/data").iterdir())}
    manifest = (folder / "manifest.json").read_bytes()
    broken = folder / "manifest.json" if what == "manifest.json" else folder / "samples/data" / min(before)
    broken.write_bytes(broken.read_bytes()[:200])
    made = request_of(folder)
    found = repair(RepairRequest(str(folder), made.teacher, (lying,), made.settings, made.field_params))
    assert found["problems"] and not found["left"]
    assert (folder / "manifest.json").read_bytes() == manifest
    assert {file.name: file.read_bytes() for file in sorted((folder / "samples/data").iterdir())} == before


def test_a_later_version_is_refused_in_one_line(old: Path, teacher_parts: Any) -> None:
    later = {**TeacherCache(str(old)).plan.preparation, "version": PREPARATION + 1}
    with pytest.raises(CompatibilityError, match=f"version {PREPARATION + 1}.* versions 1 to {PREPARATION}: use "):
        Preparer.like(later, *teacher_parts)
