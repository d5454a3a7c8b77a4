"""The null teacher: real shapes, the same row the same signals whatever stands beside it, and nobody takes its cache for a real one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipelines.capture.cache_teacher import capture
from pipelines.capture.worker import CaptureRequest
from teacher_cache.errors import KdcliError
from teacher_cache.fields import create_field, field_kinds, wants_of
from teacher_cache.preparing.prepare import Preparer
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.reading.cached_samples import CachedSamples
from teacher_cache.reading.verify import verify
from teacher_cache.records import Prepared
from teacher_cache.sources import open_source
from teacher_cache.teachers.backends import load_processor, open_teacher, teacher_fingerprint
from teacher_cache.teachers.null import NullTeacher, null_settings
from teacher_cache.teachers.transformers import TeacherSpec
from teacher_cache.wants import Wants

WANTS = wants_of(create_field(name, {}) for name in field_kinds())


@pytest.fixture(scope="module")
def spec(tiny_teacher: Path) -> TeacherSpec:
    return TeacherSpec(f"null:{tiny_teacher}", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def rows(teacher_parts, mixture, world_json) -> list[Prepared]:
    """Rows with no, one and two pictures."""
    from teacher_cache.errors import SkipSample
    from teacher_cache.records import Sample
    from teacher_cache.sources import DataSpec

    preparer, prepared = Preparer(*teacher_parts), []
    pictures = DataSpec("pairs", world_json.train, image_root=str(world_json.images))
    sources = [open_source(one) for one in (mixture[1], pictures)]
    for row in (row for source in sources for group in source.scan(100) for row in source.read(group)):
        try:
            prepared += [preparer.prepare(row)] if isinstance(row, Sample) else []
        except SkipSample:
            continue
    assert {len(one.layout) for one in prepared} == {0, 1, 2}
    return prepared


def tensors(said) -> list[torch.Tensor]:
    """Every tensor of a TeacherOutput."""
    heads = [one for each in (said.topk, said.sampled) for head in each.values() for one in vars(head).values()]
    return [*said.hidden.values(), *said.attention.values(), *heads, said.gram, said.features]


def test_shapes_are_a_real_teachers(spec: TeacherSpec, teacher_parts, rows: list[Prepared]) -> None:
    real = open_teacher(replace(spec, id=null_settings(spec.id).folder), *teacher_parts)
    null = open_teacher(spec, *teacher_parts)
    assert isinstance(null, NullTeacher)
    assert null.vocabulary == real.vocabulary and null.head.shape == real.head.shape
    for made_up, said in zip(null(rows, WANTS), real(rows, WANTS)):
        assert [(t.shape, t.dtype) for t in tensors(made_up)] == [(t.shape, t.dtype) for t in tensors(said)]
        assert all(torch.isfinite(t).all() for t in tensors(made_up))
        for head in made_up.topk.values():
            assert all(len(set(ids)) == len(ids) for ids in head.ids.tolist())
            assert (head.ids < null.vocabulary).all()
            mass = head.log_probs.exp().sum(dim=1) + head.log_tail.exp()
            torch.testing.assert_close(mass, torch.ones_like(mass), atol=1e-5, rtol=0)
            assert (head.log_probs.diff(dim=1) <= 0).all()
        for one in made_up.sampled.values():
            assert all(len(set(ids)) == len(ids) for ids in one.ids.tolist())


def test_a_row_is_the_same_in_any_batch(spec: TeacherSpec, teacher_parts, rows: list[Prepared]) -> None:
    together = open_teacher(spec, *teacher_parts)(rows, WANTS)
    other = open_teacher(spec, *teacher_parts)
    for one, said in zip(rows, together):
        (alone,) = other([one], WANTS)
        assert all(torch.equal(a, b) for a, b in zip(tensors(alone), tensors(said)))
    first, second = (one.hidden["response"][0] for one in together[:2])
    assert not torch.equal(first, second)  # another key, other signals


def test_a_whole_capture_however_it_is_batched(
    spec: TeacherSpec, make_request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every field there is, calibrated ones too; the loader reads what was written."""
    files: list[dict[str, bytes]] = []
    for window_rows, batch_tokens in ((2, 256), (256, 4096)):
        monkeypatch.setattr("teacher_cache.capturing.cache_shard.WINDOW_ROWS", window_rows)
        out = tmp_path / f"by-{window_rows}"
        settings = {"fields": tuple(field_kinds()), "batch_tokens": batch_tokens, "calibration_rows": 8}
        request: CaptureRequest = make_request(out, **settings)
        said = capture(replace(request, teacher=spec, field_params={"vision_hidden": {"codec": "sketch"}}))
        assert any("null teacher" in note for note in said["notes"])
        found = (f for f in sorted(out.rglob("*")) if f.is_file() and ".staging" not in f.parts)
        files.append({str(f.relative_to(out)): f.read_bytes() for f in found})
    assert files[0] == files[1]
    cache = TeacherCache(str(out))
    assert not verify(cache.storage, {"samples": ""} | {f"fields/{n}": b["sha256"] for n, b in cache.fields.items()})
    assert all(body["teacher"]["backend"] == "null" for body in cache.fields.values())
    loaded = CachedSamples(cache, cache.parts(), tuple(cache.fields))
    row = loaded.read(0, 0)
    assert set(row.fields) == set(field_kinds())


def test_a_null_cache_is_no_real_teachers(spec: TeacherSpec, tiny_teacher: Path) -> None:
    real = TeacherSpec(str(tiny_teacher), dtype="float32", device="cpu")
    null, said = (teacher_fingerprint(one, *load_processor(one)) for one in (spec, real))
    assert set(null) == set(said) and null["backend"] == "null"
    assert {name for name in null if null[name] != said[name]} == {
        "weights", "architecture", "attn_implementation", "backend"
    }  # fmt: skip
    narrow = replace(spec, id=f"{spec.id},width=8,ms_per_row=5")
    assert teacher_fingerprint(narrow, *load_processor(narrow)) == {**null, "hidden_size": 8}


def test_it_sleeps_as_a_gpu_would(spec: TeacherSpec, teacher_parts, rows: list[Prepared]) -> None:
    import time

    slow = open_teacher(replace(spec, id=f"{spec.id},ms_per_row=20"), *teacher_parts)
    started = time.perf_counter()
    slow(rows[:5], Wants(topk={"response": 2}))
    assert time.perf_counter() - started >= 0.1


@pytest.mark.parametrize("given", ["null:", "null:x,width", "null:x,width=w", "null:x,seed=3", "null:x,ms_per_row=-1"])
def test_a_wrong_id_is_one_line(given: str) -> None:
    with pytest.raises(KdcliError, match=r"null:FOLDER"):
        null_settings(given)


def test_training_from_it_says_so(spec: TeacherSpec, tiny_student: Path, make_request, tmp_path: Path) -> None:
    from pipelines.settings import Settings
    from pipelines.train.stage_plans import plan_stages
    from pipelines.train.train_student import settle
    from student_train.config import TrainSettings

    request = make_request(tmp_path / "cache", fields=("response_topk",))
    capture(replace(request, teacher=spec))
    cache = TeacherCache(str(tmp_path / "cache"))
    settings = Settings(train=TrainSettings(student=str(tiny_student)))
    plans = plan_stages(cache, "kd", settings, "DFT", "paper", None)
    _, notes = settle(cache, plans, str(tiny_student))
    assert any(note.startswith("response_topk: of the null teacher") for note in notes)
