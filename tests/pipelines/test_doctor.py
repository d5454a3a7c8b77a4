"""The doctor finds every defect planted in a mixture, where it is, and loses no row."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import PIL.Image
import pytest
from rich.console import Console

from pipelines.doctor import examine, print_report
from teacher_cache.errors import DataError, SkipRow
from teacher_cache.sources import DataSpec


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
    ("over_length", {"conversations": talk("hi", "word " * 50)}),
]


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


def words(sample) -> int:
    return sum(len(turn.text.split()) for turn in sample.turns)


def test_every_planted_defect_is_found_and_no_row_is_lost(mixture):
    (part,) = examine([mixture], token_counter=words, max_length=20).parts
    expected = {reason for reason, _ in PLANTED} - {"good"}
    assert set(part.defects) == expected
    for reason, finding in part.defects.items():
        places = [i for i, (planted, _) in enumerate(PLANTED) if planted == reason]
        assert finding.count == 30 * len(places)
        rows = [int(example.place.removeprefix("mix.json row ")) for example in finding.examples]
        assert rows == [i for i in range(len(PLANTED) * 30) if i % len(PLANTED) in places][:5]
        assert all(example.detail for example in finding.examples)
    assert (part.rows, part.usable, part.defective) == (450, 120, 330)
    assert (part.with_images, part.text_only, part.multi_turn, part.multi_image) == (90, 30, 30, 30)
    assert part.defects["over_length"].examples[0].detail == "51 tokens, limit 20"


def test_notes_cost_no_row(mixture):
    (part,) = examine([mixture], max_examples=1).parts
    assert "over_length" not in part.defects
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


def test_the_report_is_the_same_however_many_workers(mixture):
    one, many = (examine([mixture], workers=workers) for workers in (1, 8))
    assert one == many


def test_parts_limits_progress_and_json(mixture):
    seen = []
    specs = [mixture, replace(mixture, part="first", limit=7)]
    report = examine(specs, progress=lambda *call: seen.append(call))
    assert seen == [("sft", 200, 450), ("sft", 400, 450), ("sft", 450, 450), ("first", 7, 7)]
    plain = json.loads(json.dumps(report.to_json()))
    assert plain["rows"] == plain["usable"] + plain["defective"] == 457
    assert [part["part"] for part in plain["parts"]] == ["sft", "first"]
    assert plain["parts"][1]["defects"]["image_missing"]["count"] == 2


def test_a_token_counter_may_skip_rows_itself(mixture):
    def refuse(sample):
        raise SkipRow("reserved_token", "<|im_end|> in the text")

    (part,) = examine([mixture], token_counter=refuse, max_length=20).parts
    assert (part.usable, part.defects["reserved_token"].count) == (0, 150)


def test_the_printed_report_is_plain_about_what_the_data_says(mixture):
    stream = io.StringIO()
    print_report(examine([mixture]), Console(file=stream, width=200, force_terminal=False))
    text = stream.getvalue()
    assert "450 rows = 150 usable (33.33 %) + 300 defective" in text
    assert all(reason in text for reason in {reason for reason, _ in PLANTED} - {"good", "over_length"})
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
