"""The labels that the teacher contradicts, on the page: counts as the doctor has them, and the answers with their pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.edit.fields import drop_field
from pipelines.judge.labels.survey import survey
from pipelines.report import labels
from pipelines.report.labels import label_section
from pipelines.report.page import write_report
from teacher_cache.reading.cache import TeacherCache


def test_the_answers_stand_with_question_picture_and_the_teachers_word(
    noisy: Any, make_run: Any, tmp_path: Path
) -> None:
    url, planted = noisy
    cache = TeacherCache(str(url))
    section, made = label_section(cache, 84), survey(cache, labels.EXAMPLES)
    assert section and [one.suspect for one in section.examples] == made.worst and section.rows == 84
    assert len(section.lines) == sum(len(part.sources) for part in made.parts)
    for one in section.examples:
        listed = planted[int(one.suspect.key[:9]), one.suspect.answer.number]
        (asked, question), (answered, label) = one.example.turns
        assert (asked, answered) == ("user", "assistant") and question and label == listed["wrong"]
        assert "".join(token.text for token in one.example.tokens) == label.replace(" ", "")
        assert all(picture.cells for picture in one.example.pictures)
    assert any(one.example.pictures for one in section.examples)
    text = write_report([make_run("sft")], str(url), tmp_path / "page.html").read_text()
    assert '<section id="labels"' in text and "part sft: the teacher contradicts" in text
    assert "looks at all" not in text and 'id="image-label-' in text


def test_a_large_cache_is_looked_at_in_part(noisy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels, "ROWS_LOOKED_AT", 12)
    section = label_section(TeacherCache(str(noisy[0])), 84)
    assert section and 12 <= section.rows < 30 and section.written == 84


def test_damage_is_told_and_the_page_is_written(
    noisy: Any, copy_of: Callable[[Path], Path], make_run: Any, tmp_path: Path
) -> None:
    copy = copy_of(noisy[0])
    for tar in (copy / "fields" / "response_topk" / "data").iterdir():
        tar.write_bytes(tar.read_bytes()[:-1])
    text = write_report([make_run("sft")], str(copy), tmp_path / "page.html").read_text()
    assert "Not shown: " in text and "of fields/response_topk is damaged" in text and "Contradicted answers" not in text


def test_a_cache_that_tells_nothing_of_labels_has_no_section(tiny_cache: Path, copy_of: Callable[[Path], Path]) -> None:
    copy = copy_of(tiny_cache)
    for name in ("response_topk", "response_hidden"):
        drop_field(str(copy), name, remove=True)
    assert label_section(TeacherCache(str(copy)), 31) is None
