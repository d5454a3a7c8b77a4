"""The doctor finds every defect planted in a mixture, where it is, and loses no row."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace

import PIL.Image
import pytest
from rich.console import Console

from pipelines.capture.cache_teacher import capture
from pipelines.capture.worker import CaptureRequest
from pipelines.judge.doctor import Reading, examine, print_report
from pipelines.settings import CaptureSettings
from teacher_cache.errors import DataError
from teacher_cache.preparing.prepare import Limits
from teacher_cache.shards.commit import read_commit
from teacher_cache.shards.storage import Storage
from teacher_cache.sources import DataSpec
from teacher_cache.teachers.transformers import TeacherSpec


def picture(kind="png", colour="red", size=(8, 6)) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", size, colour).save(buffer, kind)
    return buffer.getvalue()


def talk(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


PLANTED = [
    ("good", {"image": "a.png", "conversations": talk("<image>\nwhat?", "a cat")}),
    ("good", {"conversations": talk("hi", "ho", "and?", "yes")}),
    ("good", {"image": ["a.png", "b.png"], "conversations": talk("<image><image>", "two")}),
    ("good", {"image": "gif.jpg", "conversations": talk("<image>", "moves")}),
    ("image_missing", {"image": "none.png", "conversations": talk("<image>", "x")}),
    ("image_missing", {"image": "empty.png", "conversations": talk("<image>", "x")}),
    ("image_corrupt", {"image": "half.jpg", "conversations": talk("<image>", "x")}),
    ("image_too_large", {"image": "large.png", "conversations": talk("<image>", "x")}),
    ("image_path_unsafe", {"image": "../secret", "conversations": talk("<image>", "x")}),
    ("placeholder_mismatch", {"conversations": talk("<image>", "x")}),
    ("empty_answer", {"conversations": talk("hi", "  ")}),
    ("no_answer", {"conversations": talk("hi")}),
    ("bad_turn_order", {"conversations": talk("hi", "ho", "hu", "ha")[1:]}),
    ("bad_row", {"conversation": talk("hi", "ho")}),
    ("over_length", {"conversations": talk("hi", "word " * 200)}),
    ("reserved_token", {"conversations": talk("hi", "<|end|>")}),
]
OF_A_MODEL = {"over_length", "reserved_token"}
"""What only a tokenizer sees."""


@pytest.fixture
def mixture(tmp_path):
    (tmp_path / "secret").write_bytes(b"secret")
    root = tmp_path / "images"
    root.mkdir()
    files = {
        "a.png": picture(),
        "b.png": picture(colour="blue"),
        "gif.jpg": picture("gif"),
        "empty.png": b"",
        "half.jpg": picture("jpeg", size=(190, 190))[:800],
        "large.png": picture(size=(300, 300)),
    }
    for name, data in files.items():
        (root / name).write_bytes(data)
    rows = [{"id": f"[red]{i}\x1b[31m"} | row for i, (_, row) in enumerate(PLANTED * 30)]
    (tmp_path / "mix.json").write_text(json.dumps(rows))
    return DataSpec("sft", str(tmp_path / "mix.json"), image_root=str(root), max_image_pixels=200 * 200)


@pytest.fixture(scope="module")
def reading(tiny_teacher):
    """``reading(max_length, over_length, show)``: rows as the tiny teacher's, 36 vision tokens an image."""
    return lambda length=2048, over="skip", show=0: Reading(TeacherSpec(str(tiny_teacher)), Limits(length, over), show)


def test_every_planted_defect_is_found_and_no_row_is_lost(mixture, reading):
    (part,) = examine([mixture], reading=reading(150)).parts
    expected = {reason for reason, _ in PLANTED} - {"good"}
    assert set(part.defects) == expected
    for reason, finding in part.defects.items():
        places = [i for i, (planted, _) in enumerate(PLANTED) if planted == reason]
        assert finding.count == 30 * len(places)
        rows = [int(example.place.removeprefix("mix.json row ")) for example in finding.examples]
        assert rows == [i for i in range(len(PLANTED) * 30) if i % len(PLANTED) in places][:5]
        assert all(example.detail for example in finding.examples)
    assert (part.rows, part.usable, part.defective) == (480, 120, 360)
    assert (part.with_images, part.text_only, part.multi_turn, part.multi_image) == (90, 30, 30, 30)
    assert re.fullmatch(r"[234]\d\d tokens, the limit is 150", part.defects["over_length"].examples[0].detail)


def test_notes_cost_no_row(mixture):
    (part,) = examine([mixture], max_examples=1).parts
    assert not OF_A_MODEL & set(part.defects)
    assert part.notes["extension_differs"].count == 30
    assert part.notes["extension_differs"].examples[0].detail == "'gif.jpg' holds gif"
    # a.png twice, b.png, gif.jpg, half.jpg, large.png in each of 30 rounds; five different images.
    assert part.notes["duplicate_images"].count == 6 * 30 - 5
    assert "duplicate_ids" not in part.notes
    assert all(len(finding.examples) == 1 for finding in (part.defects | part.notes).values())


def test_columns_that_are_not_used_are_named_once_a_set(tmp_path):
    """A file has one set of columns in most rows: the rare one must not hide behind its first rows."""
    rows = [{"conversations": talk("hi", "ho"), "tools": "[{}]"}] * 9
    rows += [{"conversations": talk("hi", "ho"), "tools": "[{}]", "weight": 0.5}, {"conversations": talk("hi", "ho")}]
    (tmp_path / "mix.json").write_text(json.dumps(rows))
    (part,) = examine([DataSpec("sft", str(tmp_path / "mix.json"))], max_examples=2).parts
    found = part.notes["columns_unused"]
    assert (part.usable, found.count) == (11, 10)
    assert [(one.place, one.detail) for one in found.examples] == [
        ("mix.json row 0", "'tools'"),
        ("mix.json row 9", "'tools', 'weight'"),
    ]
    stream = io.StringIO()
    print_report(examine([DataSpec("sft", str(tmp_path / "mix.json"))]), Console(file=stream, width=200))
    assert "change training elsewhere and are not used here" in stream.getvalue()


def test_duplicate_ids_are_counted_also_among_skipped_rows(tmp_path):
    rows = [{"id": "a", "conversations": talk("hi", "ho")}] * 3 + [{"conversations": talk("hi", "ho")}] * 2
    rows.append({"id": "a", "conversations": talk("hi")})
    (tmp_path / "mix.json").write_text(json.dumps(rows))
    (part,) = examine([DataSpec("sft", str(tmp_path / "mix.json"))]).parts
    assert part.notes["duplicate_ids"].count == 3
    assert [example.place for example in part.notes["duplicate_ids"].examples][:2] == [
        "mix.json row 1",
        "mix.json row 2",
    ]


def test_the_report_is_the_same_however_many_threads(mixture):
    one, many = (examine([mixture], workers=workers) for workers in (1, 8))
    assert one == many


def test_every_row_is_named_on_request(mixture):
    (part,) = examine([mixture], every_defect=True).parts
    assert all(len(finding.examples) == finding.count for finding in part.defects.values())
    assert all(len(finding.examples) == 5 for finding in part.notes.values())


def test_parts_limits_progress_and_json(mixture):
    seen = []
    specs = [mixture, replace(mixture, part="first", limit=7)]
    report = examine(specs, progress=lambda *call: seen.append(call))
    assert seen == [*(("sft", done, 480) for done in (0, 200, 400, 480)), ("first", 0, 7), ("first", 7, 7)]
    plain = json.loads(json.dumps(report.to_json()))
    assert plain["rows"] == plain["usable"] + plain["defective"] == 487
    assert [part["part"] for part in plain["parts"]] == ["sft", "first"]
    assert plain["parts"][1]["defects"]["image_missing"]["count"] == 2


def test_a_cut_row_is_usable_and_what_it_lost_is_counted(tmp_path, reading):
    (tmp_path / "a.png").write_bytes(picture())
    rows = [
        {"id": "cut", "image": ["a.png"] * 2, "conversations": talk("<image>", "one", "<image>", "two")},
        {"id": "whole", "image": "a.png", "conversations": talk("<image>", "one")},
        {"id": "long", "conversations": talk("hi", "word " * 200)},
    ]
    (tmp_path / "mix.json").write_text(json.dumps(rows))
    (part,) = examine([DataSpec("sft", str(tmp_path / "mix.json"))], reading=reading(60, "cut")).parts
    assert {kind: finding.count for kind, finding in part.defects.items()} == {"over_length": 1}
    assert (part.notes["cut"].count, part.notes["cut_images"].count) == (1, 1)
    assert part.notes["cut"].examples[0].detail == "2 of 4 turns kept, 1 of 2 images lost"
    (skipping,) = examine([DataSpec("sft", str(tmp_path / "mix.json"))], reading=reading(60)).parts
    assert skipping.defects["over_length"].count == 2 and "cut" not in skipping.notes


@pytest.mark.parametrize("over", ["skip", "cut"])
def test_the_doctor_refuses_what_a_capture_skips(mixture, reading, tiny_teacher, tmp_path, over):
    """Row by row, for the same reason in the same words; and both count the same cuts."""
    settings = CaptureSettings(shards=1, store="none", max_length=75, over_length=over)
    (part,) = examine([replace(mixture, limit=32)], every_defect=True, reading=reading(75, over)).parts
    summary = capture(
        CaptureRequest(TeacherSpec(str(tiny_teacher)), (replace(mixture, limit=32),), str(tmp_path / "c"), settings, {})
    )
    skipped = read_commit(Storage(str(tmp_path / "c")), "samples", 0).skipped
    said = [(one.place, reason, one.detail) for reason, found in part.defects.items() for one in found.examples]
    assert sorted(said) == sorted((one.place, one.reason, one.detail[:160]) for one in skipped)
    assert summary["columns"]["samples"]["written"] == part.usable > 0


def test_the_last_tokens_of_rows_with_their_labels(mixture, reading):
    (part,) = examine([mixture], reading=reading(show=2)).parts
    assert [row["place"] for row in part.shown] == ["mix.json row 0", "mix.json row 1"]
    assert (part.shown[0]["image_tokens"], part.shown[1]["image_tokens"]) == (36, 0)
    tail = part.shown[1]["tail"]
    assert (tail[-1]["role"], tail[-1]["label"], tail[-1]["end"]) == ("assistant", True, True)
    assert {one["label"] for one in tail if one["role"] == "user"} == {False}
    assert "".join(one["token"] for one in tail if one["label"]) == "ho<|end|>yes<|end|>"


def test_rows_that_all_fail_for_one_reason_are_said_aloud(mixture, tmp_path):
    """However many text-only rows stand beside them: of rows with images none is usable."""
    rows = [{"image": f"{i}.png", "conversations": talk("<image>", "x")} for i in range(20)]
    rows += [{"conversations": talk("hi", "ho")}] * 60
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    spec = DataSpec("sft", str(tmp_path / "rows.json"))
    (line,) = examine([spec]).warnings
    assert "part 'sft': 20 of 20 rows with images fail for one reason, image_missing" in line
    assert "rows.json row 0" in line and "--image-root FOLDER" in line
    assert examine([mixture]).warnings == ()
    rows = [{"image": "images/a.png", "conversations": talk("what?", "x")}] * 2 + rows[20:]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (line,) = examine([spec]).warnings
    assert "2 of 2 rows with images fail for one reason, placeholder_mismatch" in line
    (tmp_path / "rows.json").write_text(json.dumps([{"conversations": talk("hi", " ")}] * 9 + rows[-1:]))
    (line,) = examine([spec]).warnings
    assert "9 of 10 rows fail for one reason, empty_answer" in line


def test_the_printed_report_is_plain_about_what_the_data_says(mixture):
    stream = io.StringIO()
    print_report(examine([mixture]), Console(file=stream, width=200, force_terminal=False))
    text = stream.getvalue()
    assert "480 rows = 180 usable (37.50 %) + 300 defective" in text
    assert all(reason in text for reason in {reason for reason, _ in PLANTED} - {"good"} - OF_A_MODEL)
    assert "mix.json row 4 " in text
    assert "id '[red]4\\x1b[31m'" in text
    assert "\x1b" not in text


def test_no_rows_at_all(tmp_path):
    (tmp_path / "mix.json").write_text("[]")
    report = examine([DataSpec("sft", str(tmp_path / "mix.json"))])
    assert (report.rows, report.usable, report.defective) == (0, 0, 0)
    print_report(report, Console(file=io.StringIO()))


def test_a_mistyped_last_part_shows_before_the_first_is_read(mixture):
    calls = []
    with pytest.raises(DataError, match="no such file"):
        examine([mixture, replace(mixture, path="none.json")], progress=lambda *call: calls.append(call))
    assert calls == []


def test_an_unreadable_part_is_an_error_not_a_report(mixture, tmp_path):
    (tmp_path / "mix.json").write_text((tmp_path / "mix.json").read_text()[:-20])
    with pytest.raises(DataError, match="unreadable json"):
        examine([mixture])
