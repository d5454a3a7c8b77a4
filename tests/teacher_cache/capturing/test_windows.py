"""What a capture holds in memory: windows of bounded bytes, pixels no longer than the teacher needs them."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.capture.calibrate import calibration_samples, hidden_rows, mixture_reader
from teacher_cache.capturing import cache_shard as line
from teacher_cache.capturing.cache_shard import Window, cache_shard, prepare_windows
from teacher_cache.capturing.capture_job import CaptureJob
from teacher_cache.capturing.window_bytes import input_bytes, output_bytes, weigher
from teacher_cache.fields import create_field
from teacher_cache.planning.make_plan import make_plan
from teacher_cache.planning.plan import Plan
from teacher_cache.preparing.prepare import Preparer
from teacher_cache.records import Prepared, TeacherOutput
from teacher_cache.shards.storage import Storage
from teacher_cache.teachers.null import NullTeacher
from teacher_cache.teachers.transformers import TeacherSpec
from teacher_cache.wants import ROW_KINDS, Sampling, Wants

VISION = 36 * 48 * 4
"""Bytes of a picture's hidden states, by the tiny teacher in float32."""


@pytest.fixture(scope="module")
def preparer(teacher_parts) -> Preparer:
    return Preparer(*teacher_parts)


@pytest.fixture(scope="module")
def plan(mixture, preparer: Preparer) -> Plan:
    return make_plan(mixture, 2, preparer.fingerprint(), 0, image_tokens=36)


@pytest.fixture
def job(plan: Plan, tmp_path: Path) -> CaptureJob:
    fields = {"vision_hidden": create_field("vision_hidden", {"codec": "fp32"})}
    return CaptureJob(Storage(str(tmp_path)), plan, {"vision_hidden": "0" * 64}, fields, batch_tokens=64)


@pytest.fixture(scope="module")
def null(tiny_teacher: Path, teacher_parts) -> NullTeacher:
    return NullTeacher(TeacherSpec(f"null:{tiny_teacher}"), *teacher_parts)


def windows(job: CaptureJob, preparer: Preparer, weigh: Any) -> Iterator[Window]:
    for shard in range(2):
        yield from prepare_windows(job, shard, mixture_reader(job.plan)(shard), preparer, weigh=weigh)


def test_a_window_takes_no_more_bytes_than_it_may(job, preparer: Preparer, null, monkeypatch) -> None:
    weigh = weigher(Wants(hidden={"vision"}), null, preparer.config)

    def size(window: Window) -> int:
        return sum(weigh(*row) for row in zip(window.samples, window.prepared))

    whole = list(windows(job, preparer, weigh))
    assert len(whole) == 2, "a row count alone would take each shard at once"
    largest = max(size(Window([s], [p])) for w in whole for s, p in zip(w.samples, w.prepared))
    for most in (3 * largest, largest, 1):
        monkeypatch.setattr(line, "WINDOW_BYTES", most)
        found = list(windows(job, preparer, weigh))
        assert all(size(one) <= most or len(one) == 1 for one in found)
        assert [p.key for one in found for p in one.prepared] == [p.key for one in whole for p in one.prepared]
    assert len(found) == 31, "a row beyond the bound comes alone"
    monkeypatch.setattr(line, "WINDOW_BYTES", 1 << 40)
    monkeypatch.setattr(line, "WINDOW_ROWS", 4)
    assert max(map(len, windows(job, preparer, weigh))) == 4


def test_pixels_go_with_the_batch_that_the_teacher_has_seen(job, preparer: Preparer, null) -> None:
    """At every batch those of the batches before are gone, though their window is still with the teacher."""
    seen: list[weakref.ref[torch.Tensor]] = []
    batches = []

    def teacher(prepared: Sequence[Prepared], wants: Wants) -> list[TeacherOutput]:
        assert len([one for one in seen if one() is not None]) <= 1, "the preparing thread may hold its last row"
        assert all("pixel_values" in one.pixels and one.images for one in prepared if one.layout)
        seen.extend(weakref.ref(one.pixels["pixel_values"]) for one in prepared if one.layout)
        batches.append(len(prepared))
        return null(prepared, wants)

    for shard in range(2):
        cache_shard(job, shard, job.columns(shard), mixture_reader(job.plan)(shard), preparer, teacher)
    assert sum(batches) == 31 and len(batches) > 4 and len(seen) > 10


WANTS = (
    *(Wants(hidden={kind}) for kind in ROW_KINDS),
    Wants(topk={"vision": 8}),
    Wants(topk={"response": 50}),
    Wants(sampled={"response": Sampling("threshold", 12, 0)}),
    Wants(attention={0: "each", 1: "mean"}),
    Wants(gram=True),
    Wants(features=True),
)


@pytest.mark.parametrize("want", WANTS)
def test_an_answer_takes_what_was_expected(plan: Plan, preparer: Preparer, null, want: Wants) -> None:
    """To the few bytes a row (tail, log Z, entropy) that are not counted."""

    def bytes_of(value: Any) -> int:
        if isinstance(value, torch.Tensor):
            return value.numel() * value.element_size()
        if isinstance(value, dict):
            return sum(map(bytes_of, value.values()))
        return sum(map(bytes_of, vars(value).values())) if hasattr(value, "ids") else 0

    heads = preparer.config.get_text_config().num_attention_heads
    for row in calibration_samples(plan, preparer, 6, frozenset()):
        (said,) = null([row], want)
        real = sum(map(bytes_of, vars(said).values()))
        guessed = output_bytes(row, want, null.state_bytes, heads)
        assert guessed <= real <= guessed + 8 * (len(row.vision_positions) + len(row.response_rows))


def test_a_row_weighs_its_pixels_its_files_and_its_answer(plan: Plan, preparer: Preparer, null) -> None:
    (window,) = [next(prepare_windows_of(plan, preparer))]
    sample, prepared = next((s, p) for s, p in zip(window.samples, window.prepared) if p.layout)
    bare = len(sample.images[0].data) + 3 * 96 * 96 * 4
    assert input_bytes(sample, prepared) == bare
    assert weigher(Wants(hidden={"vision"}), null, preparer.config)(sample, prepared) == bare + VISION
    assert weigher(Wants(hidden={"vision"}), None, preparer.config)(sample, prepared) == bare + VISION


def prepare_windows_of(plan: Plan, preparer: Preparer) -> Iterator[Window]:
    job = CaptureJob(Storage("memory://nothing"), plan, {}, {})
    return prepare_windows(job, 0, mixture_reader(plan)(0), preparer)


def test_calibration_keeps_no_more_rows_than_a_fit_looks_at(plan: Plan, preparer: Preparer, monkeypatch) -> None:
    """Every second of those that come, and again, so that pixels and answers of more are never there."""
    wants = Wants(hidden={"vision", "response"})
    every = calibration_samples(plan, preparer, 31, frozenset(), wants=wants)
    assert len(every) == 31
    monkeypatch.setattr("pipelines.capture.calibrate.MOST_ROWS", 36 * 8)
    kept = calibration_samples(plan, preparer, 31, frozenset(), wants=wants)
    assert 36 * 4 <= hidden_rows(kept, wants) <= 36 * 8
    stride = -(-len(every) // len(kept))
    assert stride & (stride - 1) == 0 and [one.key for one in kept] == [one.key for one in every[::stride]]
