"""Rows from stored tokens are the rows that rendering and tokenising give, bit by bit; where they would not be, the long way is taken."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from student_train.compression import compress_processor
from teacher_cache.errors import SkipSample
from teacher_cache.preparing.known_text import KnownText, same_text_side
from teacher_cache.preparing.prepare import Limits, Preparer
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.reading.cached_samples import CachedSample, CachedSamples
from teacher_cache.records import Prepared
from teacher_cache.teachers.transformers import TeacherSpec, load_processor

PIXELS = 10_000_000


def rows_of(folder: Path) -> tuple[TeacherCache, list[CachedSample]]:
    cache = TeacherCache(str(folder))
    rows = CachedSamples(cache, cache.parts(), [])
    return cache, [rows.read(shard, row) for shard, count in enumerate(rows.counts) for row in range(count)]


@pytest.fixture(scope="module", params=["one picture", "two pictures", "coarse student", "compressed student"])
def case(request: pytest.FixtureRequest) -> tuple[TeacherCache, list[CachedSample], Preparer]:
    """A cache's rows and a student's preparer with the teacher's text side."""
    get = request.getfixturevalue
    folder = get("two_picture_cache") if request.param == "two pictures" else get("tiny_cache")
    processor, config = load_processor(
        TeacherSpec(str(get("coarse_student" if request.param == "coarse student" else "tiny_student")))
    )
    if request.param == "compressed student":
        processor = compress_processor(processor, (3, 3))
    cache, rows = rows_of(folder)
    return cache, rows, Preparer(processor, config, Limits())


@pytest.fixture(scope="module")
def two_picture_cache(make_request, world_json: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pipelines.capture.cache_teacher import capture
    from teacher_cache.sources import DataSpec

    out = tmp_path_factory.mktemp("two") / "cache"
    data = (DataSpec("sft", str(world_json.train), image_root=str(world_json.images), template="chat"),)
    capture(make_request(out, data=data, fields=("response_hidden",), shards=2))
    return out


def assert_same(one: Prepared, other: Prepared) -> None:
    for field in fields(Prepared):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if field.name == "text":
            assert a.image_at == b.image_at
            assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("ids", "role", "turn", "response"))
        elif field.name == "pixels":
            assert set(a) == set(b) and all(
                torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a
            )
        elif isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype and torch.equal(a, b), field.name
        else:
            assert a == b, field.name


@pytest.mark.parametrize("proofs", [0, 2])
def test_every_row_is_as_the_long_way_has_it(
    case: tuple[TeacherCache, list[CachedSample], Preparer], proofs: int
) -> None:
    cache, rows, preparer = case
    known = KnownText(preparer, proofs)
    assert same_text_side(preparer.fingerprint(), cache.plan.preparation)
    assert len({len(row.sample.images) for row in rows}) > 1
    for row in rows:
        template = cache.template(row.sample.part)
        slow = preparer.prepare(row.sample, template, PIXELS)
        assert_same(known.prepare(row.sample, row.text, row.key, template, PIXELS), slow)
    assert known._trusted


def test_no_template_and_no_tokenizer_are_asked(tiny_cache: Path, tiny_student: Path, monkeypatch: Any) -> None:
    _, rows = rows_of(tiny_cache)
    preparer = Preparer(*load_processor(TeacherSpec(str(tiny_student))))
    monkeypatch.setattr(Preparer, "prepare", None)
    known = KnownText(preparer, proofs=0)
    assert all(len(known.prepare(row.sample, row.text, row.key, "chat", PIXELS)) for row in rows)


def test_a_processor_that_does_more_is_not_trusted(tiny_cache: Path, tiny_student: Path) -> None:
    """Text around an image (InternVL's start and end tokens), or another count than it really writes."""
    cache, rows = rows_of(tiny_cache)
    with_image = next(row for row in rows if row.sample.images)
    template = cache.template(with_image.sample.part)
    for said in ("begin<image>end", "<image>"):
        processor, config = load_processor(TeacherSpec(str(tiny_student)))
        preparer = Preparer(processor, config)
        slow = preparer.prepare(with_image.sample, template, PIXELS)
        known = KnownText(preparer, proofs=1)
        asked = []

        def replaced(inputs: Any, image_idx: int, text: str = said, asked: list[int] = asked, **rest: Any) -> str:
            asked.append(image_idx)
            return text

        real, processor.replace_image_token = processor.replace_image_token, replaced
        preparer.prepare = lambda *_, slow=slow: slow  # type: ignore[method-assign]
        found = known.prepare(with_image.sample, with_image.text, with_image.key, template, PIXELS)
        assert asked and found is slow and not known._trusted
        processor.replace_image_token = real


def test_other_texts_are_other_tokens(tiny_cache: Path, tiny_student: Path) -> None:
    cache = TeacherCache(str(tiny_cache))
    preparer = Preparer(*load_processor(TeacherSpec(str(tiny_student))))
    ours = preparer.fingerprint()
    assert not same_text_side({**ours, "chat_template": "another"}, cache.plan.preparation)
    assert not same_text_side({**ours, "first_token": True}, cache.plan.preparation)
    assert not same_text_side({**ours, "version": 1}, cache.plan.preparation)
    assert not same_text_side({**ours, "tokenizer": {"sha256": "another", "length": 1}}, cache.plan.preparation)


def test_what_is_too_long_is_refused_as_ever(tiny_cache: Path, tiny_student: Path) -> None:
    _, rows = rows_of(tiny_cache)
    preparer = Preparer(*load_processor(TeacherSpec(str(tiny_student))), Limits(max_length=4))
    with pytest.raises(SkipSample, match="over_length"):
        KnownText(preparer, proofs=0).prepare(rows[0].sample, rows[0].text, rows[0].key, "chat", PIXELS)


def test_more_images_than_places_go_the_long_way(tiny_cache: Path, tiny_student: Path) -> None:
    _, rows = rows_of(tiny_cache)
    row = next(row for row in rows if row.sample.images)
    preparer = Preparer(*load_processor(TeacherSpec(str(tiny_student))))
    twice = replace(row.sample, images=row.sample.images * 2)
    with pytest.raises(SkipSample):
        KnownText(preparer, proofs=0).prepare(twice, row.text, row.key, "chat", PIXELS)
