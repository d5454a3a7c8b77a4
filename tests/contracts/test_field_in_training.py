"""A field that training uses is its own file and a line of ``needs.ONE_FIELD``: a made-up one is captured, planned, checked as it is read,
needed by a method and trained on, with nothing else told of it."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch

import kdcli
from kdcli.losses import SampleTerm, StepLoss
from pipelines.capture.cache_teacher import capture
from pipelines.judge.plan.field_sizes import EXACT, RowCounts, coded_rows, size_field
from student_train.alignment import beside
from student_train.needs import ONE_FIELD, Need, OneField, of_states, row_aligned, serve, served_by, whats
from student_train.teacher_view import TeacherView
from teacher_cache import fields
from teacher_cache.codecs import container
from teacher_cache.errors import CacheError, CompatibilityError
from teacher_cache.fields import create_field, field_kinds
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.reading.cached_samples import CachedSamples
from teacher_cache.records import Prepared, TeacherOutput
from teacher_cache.shards.commit import committed_shards
from teacher_cache.shards.mender import ShardReplacer
from teacher_cache.wants import Wants
from tests.kdcli.conftest import as_in_stage_dft

ROOT = Path(__file__).parents[2]
NAME, NEED = "vision_loudness", "vision_loudness_map"


class LoudnessField:
    """Length and largest entry of every vision state: what its file would hold."""

    name = NAME
    version = 1
    params: Mapping[str, Any] = MappingProxyType({})
    calibrated = False
    temperatures = None
    wants = Wants(hidden={"vision"})
    shape = (None, "vision")

    def encode(self, prepared: Prepared, output: TeacherOutput) -> dict[str, torch.Tensor]:
        states = output.hidden["vision"].to(torch.float32)
        return {"loudness": torch.stack([states.norm(dim=1), states.abs().sum(dim=1)])}

    def decode(self, stored: dict[str, torch.Tensor]) -> torch.Tensor:
        return stored["loudness"]


class LoudMethod:
    """The student's vision states as loud as the teacher's."""

    def needs(self) -> frozenset[Need]:
        return frozenset({Need(NEED)})

    def terms(self) -> dict[str, Any]:
        return {
            "loud": SampleTerm(2.0, lambda one: (one.hidden("vision").norm(dim=1) - one.said(NEED)[0]).abs().mean())
        }


@pytest.fixture(scope="module", autouse=True)
def told() -> Any:
    """The file, found as one of the folder; and the one line."""
    module = SimpleNamespace(FIELDS=(NAME,), create=lambda name, params: LoudnessField(), __name__="made_up")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fields, "field_kinds", lambda: field_kinds() | {NAME: module})
        patch.setitem(ONE_FIELD, NEED, OneField(NAME, vision_axis=1, row_aligned=True))
        yield


@pytest.fixture(scope="module")
def loud(tmp_path_factory: pytest.TempPathFactory, make_request: Callable[..., Any]) -> Path:
    out = tmp_path_factory.mktemp("loud") / "cache"
    capture(make_request(out, codec="fp32", fields=("vision_hidden", NAME), parts_without_fields=("caption",)))
    return out


def test_it_is_read_and_trained_on(loud: Path, tiny_student: Path) -> None:
    from transformers import AutoProcessor

    student, processor = as_in_stage_dft(tiny_student), AutoProcessor.from_pretrained(tiny_student)
    cache = kdcli.open_cache(str(loud))
    said = cache.signals(range(4), parts=["sft"], needs=[NEED, "vision_hidden"])
    states = said.hidden("vision").split(said.counts("vision"))
    for ours, rows in zip(said.view.of_samples[NEED], states, strict=True):
        torch.testing.assert_close(ours[0], rows.norm(dim=1))
    rows = cache.dataset(["sft"], method=LoudMethod(), processor=processor, config=student.config)
    batch = kdcli.Collator(rows)([rows[0], rows[1]])
    (loss,) = StepLoss(student, rows)([batch])
    loss.backward()
    teacher = batch.pop("teacher")
    hidden = student.model(**batch).last_hidden_state.flatten(0, 1)[teacher.positions("vision")]
    pairs = zip(hidden.split(teacher.counts("vision")), teacher.view.of_samples[NEED], strict=True)
    expected = [(one.norm(dim=1) - theirs[0]).abs().mean() for one, theirs in pairs if len(one)]
    assert expected and loss.item() == pytest.approx(2 * torch.stack(expected).mean().item(), rel=1e-4)
    assert any(one.grad is not None and one.grad.any() for one in student.parameters())


def test_needs_know_it() -> None:
    assert NEED in whats() and NEED in row_aligned() and NEED not in of_states()
    assert served_by(Need(NEED)) == [NAME] and serve([Need(NEED)], {NAME: {}}, "loud", "").names == [NAME]
    with pytest.raises(CompatibilityError, match=f"needs {NEED}, served by {NAME}; .* --field {NAME}"):
        serve([Need(NEED)], {"affinity": {}}, "loud", "cache")


def test_its_vision_tokens_are_laid_beside_the_students() -> None:
    view = TeacherView({}, of_samples={NEED: [torch.arange(10.0).view(2, 5)]})
    moved = beside(view, lambda one, number: one[[4, 0]])
    assert moved[NEED][0].tolist() == [[4.0, 0.0], [9.0, 5.0]]


def test_its_bytes_are_planned() -> None:
    size = size_field(create_field(NAME), 48, 100, None)
    data = container.pack({"loudness": torch.zeros(2, 36)})
    assert size.basis == EXACT and size.record("sft", RowCounts(36, 5, 9)) == pytest.approx(len(data), abs=8)
    assert coded_rows(create_field(NAME), RowCounts(36, 5, 9)) == 36


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda one: one[:, 1:], r"rows \(35,\) where the sample has \(36,\)"),
        (lambda one: one[None], "3 dimensions|rows"),
    ],
)
def test_a_record_of_another_shape_is_refused_as_it_is_read(loud: Path, copy_of: Any, change: Any, said: str) -> None:
    cache = TeacherCache(str(copy_of(loud)))
    reader = cache.column(NAME)
    for shard in committed_shards(cache.storage, reader.column):
        writer = ShardReplacer(cache.storage, reader.column, shard, cache.plan_hash, cache.fields[NAME]["sha256"])
        for row, entry in enumerate(reader.entries(shard)):
            record = container.unpack(reader.read(shard, row)[container.EXTENSION])
            changed = {"loudness": change(record["loudness"]).contiguous()}
            writer.copy(entry, {container.EXTENSION: container.pack(changed)})
        for skip in reader.commit(shard).skipped:
            writer.skip(skip)
        writer.commit()
    rows = CachedSamples(TeacherCache(str(cache.storage.url)), ["sft"], [NAME])
    with pytest.raises(CacheError, match=said):
        for position, count in enumerate(rows.counts):
            rows.read_many([(position, row) for row in range(count)])


COMPOSING = (
    *(ROOT / "teacher_cache").glob("*.py"),
    *(ROOT / "teacher_cache" / "teachers").glob("*.py"),
    *(ROOT / "pipelines" / "judge" / "plan").glob("*.py"),
    *(ROOT / "student_train").glob("*.py"),
    ROOT / "student_train" / "library" / "signals.py",
)
"""What every field passes through."""
SIGNAL = {"attention"}
OTHER_MEANINGS = {
    "needs.py": set(field_kinds()),  # the one place that composes signals
    **{name: SIGNAL for name in ("null.py", "vllm_answers.py", "wants.py", "student.py")},
}
"""Files that may have these words: signals of the teacher, or of the student, have the name of a field."""


def test_no_list_of_fields_by_name() -> None:
    known = set(field_kinds()) - {"vision_hidden", "response_hidden"}  # names of needs, too
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.value}"
        for path in COMPOSING
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in known - OTHER_MEANINGS.get(path.name, set())
    ]
    assert not found, "\n".join(found)
