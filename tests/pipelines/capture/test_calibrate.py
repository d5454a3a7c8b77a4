"""Calibration: fitted on rows of every part, the same for the same teacher and rows."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.capture.cache_teacher import capture
from pipelines.capture.calibrate import MOST_ROWS, ask, calibrate, calibration_samples, fit, spread, thin
from teacher_cache.codecs import container
from teacher_cache.errors import KdcliError
from teacher_cache.fields import create_field
from teacher_cache.planning.make_plan import make_plan
from teacher_cache.planning.plan import RowGroup, Slice
from teacher_cache.preparing.prepare import Preparer
from teacher_cache.records import TeacherOutput
from teacher_cache.teachers.transformers import TransformersTeacher


def plan_of(mixture: Any, preparer: Preparer, shards: int) -> Any:
    return make_plan(mixture, shards, preparer.fingerprint(), 0, image_tokens=36)


def groups(rows: int) -> tuple[RowGroup, ...]:
    return (RowGroup(0, rows, {}, 1, 1),)


def test_slices_are_mixed_by_the_parts_shares() -> None:
    """A first part of many slices does not take all calibration rows, and a part of one slice has its row."""
    slices = [Slice("large", groups(5))] * 400 + [Slice("small", groups(5))] * 100 + [Slice("one", groups(5))]
    order = spread(slices, frozenset())
    assert Counter(one.part for one in order) == {"large": 400, "small": 100, "one": 1}
    assert Counter(one.part for one in order[:101]) == {"large": 80, "small": 20, "one": 1}
    assert {one.part for one in order[:3]} == {"large", "small", "one"}
    assert {one.part for one in spread(slices, frozenset({"large"}))} == {"small", "one"}


def test_samples_are_of_every_part(mixture, preparer: Preparer) -> None:
    found = calibration_samples(plan_of(mixture, preparer, 20), preparer, 9, frozenset())
    assert len({one.key for one in found}) == 9
    assert Counter(one.part for one in found).keys() == {"caption", "sft"}
    again = calibration_samples(plan_of(mixture, preparer, 20), preparer, 9, frozenset())
    assert [one.key for one in found] == [one.key for one in again]
    assert len(calibration_samples(plan_of(mixture, preparer, 5), preparer, 1000, frozenset())) == 31
    bare = calibration_samples(plan_of(mixture, preparer, 5), preparer, 1000, frozenset({"caption"}))
    assert {one.part for one in bare} == {"sft"} and len(bare) == 21


def test_defective_rows_are_passed_over(world_json, preparer: Preparer) -> None:
    from teacher_cache.sources import DataSpec

    spec = DataSpec("sft", str(world_json.train), image_root=str(world_json.images), template="chat")
    found = calibration_samples(plan_of([spec], preparer, 3), preparer, 100, frozenset())
    defects = {row for kind, rows in world_json.defects.items() if kind != "duplicate_id" for row in rows}
    assert {int(one.key.split("-")[0]) for one in found} == set(range(24)) - defects


@pytest.mark.usefixtures("one_thread")
def test_two_fits_are_the_same_bytes(mixture, preparer: Preparer, teacher_model, teacher_parts) -> None:
    teacher = TransformersTeacher.wrap(teacher_model, teacher_parts[0])
    params: dict[str, dict[str, Any]] = {
        "response_topk": {"k": 8},
        "vision_hidden": {"codec": "sketch"},
        "affinity": {"layout": "factored"},
    }

    def fit() -> dict[str, bytes]:
        fields: Any = {name: create_field(name, given) for name, given in params.items()}
        plan = plan_of(mixture, preparer, 5)
        fitted = calibrate(fields, plan, preparer, teacher, teacher.head, 20, 1024)
        return {name: container.pack({**one.tensors, **one.low_rank_head}) for name, one in fitted.items()}

    assert fit() == fit()


def test_rows_that_the_teacher_cannot_speak_of_are_left_out(mixture, preparer: Preparer) -> None:
    prepared = calibration_samples(plan_of(mixture, preparer, 5), preparer, 6, frozenset())
    bad = {prepared[1].key: torch.nan, prepared[4].key: torch.inf}

    def teacher(batch, wants) -> list[TeacherOutput]:
        return [TeacherOutput({"vision": torch.full((2, 3), bad.get(one.key, 1.0))}) for one in batch]

    assert len(ask(teacher, prepared, frozenset(), 1024)) == 4

    def dumb(batch, wants) -> list[TeacherOutput]:
        return [TeacherOutput({"vision": torch.full((2, 3), torch.nan)}) for _ in batch]

    with pytest.raises(KdcliError, match=r"found no usable row: run `kdcli doctor`"):
        field: Any = create_field("vision_hidden", {"codec": "sketch"})
        calibrate(
            {"vision_hidden": field},
            plan_of(mixture, preparer, 5),
            preparer,
            dumb,
            torch.ones(4, 3),
            6,
            1024,
        )


def test_a_fit_looks_at_so_many_rows_only() -> None:
    """Whole samples are left out, evenly."""
    outputs = [TeacherOutput({"vision": torch.full((MOST_ROWS // 8, 1), float(i))}) for i in range(20)]
    kept = thin(outputs)
    assert sum(len(one.hidden["vision"]) for one in kept) <= MOST_ROWS
    assert [int(one.hidden["vision"][0]) for one in kept] == list(range(0, 20, 3))
    assert thin(outputs[:3]) == outputs[:3] and thin([]) == []


def test_too_few_rows_name_the_flag(make_request, tmp_path: Path) -> None:
    with pytest.raises(
        KdcliError,
        match=r"field \w+_hidden: calibration saw \d+ rows of width 48: at least 96 .*"
        r"raise --calibration-rows",
    ) as caught:
        capture(make_request(tmp_path / "c", fields=(), store="standard", calibration_rows=2))
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "c").glob("fields/*/field.json")), "nothing is promised that cannot be kept"


def test_a_mixture_that_has_too_few_rows_is_told_what_it_can_have(make_request, mixture, tmp_path: Path) -> None:
    """More calibration rows are no advice where there are none; what is advised works in the same folder."""
    few = [replace(part, limit=1) for part in mixture]
    given = {"data": few, "fields": (), "shards": 2}
    with pytest.raises(KdcliError, match=r"at least 96 are needed, and these are all 2 usable rows .* --store exact"):
        capture(make_request(tmp_path / "c", store="standard", **given))
    assert capture(make_request(tmp_path / "c", store="exact", **given))["rows"] == 2


def test_a_gpu_without_room_leaves_the_fit_to_the_cpu() -> None:
    """The field is asked again, with the head and what the teacher said on the CPU."""
    asked: list[tuple[torch.device, torch.device]] = []

    class Field:
        def fit(self, outputs: list[TeacherOutput], head: torch.Tensor) -> str:
            asked.append((head.device, outputs[0].device))
            if head.device.type != "cpu":
                raise torch.OutOfMemoryError
            return "fitted"

    elsewhere = TeacherOutput(device=torch.device("meta"))
    head = torch.nn.Parameter(torch.empty(2, 2), requires_grad=False)
    on_a_gpu = torch.empty(2, 2, device="meta")
    assert fit(Field(), [elsewhere], head) == "fitted"  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "cpu", lambda one: head)
        assert fit(Field(), [elsewhere], on_a_gpu) == "fitted"  # type: ignore[arg-type]
    cpu, meta = torch.device("cpu"), torch.device("meta")
    assert asked == [(cpu, meta), (meta, meta), (cpu, cpu)]
