"""Bytes against fidelity: what is read, what is on the frontier, what is drawn where."""

from __future__ import annotations

import json
import math
import re

import pytest

from pipelines.judge.preflight.request import NOTEBOOK, beside
from pipelines.report.fidelity_files import MeasuredFile, StoredFidelity, read_fidelity
from pipelines.report.frontier import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, frontiers
from teacher_cache.errors import KdcliError
from teacher_cache.shards.sealed import seal


def drawn(*stored: StoredFidelity):
    (one,) = frontiers([MeasuredFile("file", "about", list(stored), [])])
    return one


def stored(label: str, size: float, forward: float, **more) -> StoredFidelity:
    return StoredFidelity("vision", label, "top-k", size, 0.1, {"forward": forward}, **more)


def test_the_frontier_is_what_nothing_beats_in_both(fidelity_file):
    (one,) = frontiers(read_fidelity([fidelity_file]))
    assert [chart.title for chart in one.charts] == ["vision rows, forward KL", "vision rows, reverse KL"]
    best = {mark.label for mark in one.charts[0].marks if mark.best}
    assert best == {"sketch 0.1", "this cache", "bf16 hidden"}  # top-50 is larger and further off than this cache
    assert [row.label for row in one.rows if row.best] == ["sketch 0.1", "this cache: topk + hidden", "bf16 hidden"]
    assert "top-50: " not in one.charts[0].description and "bf16 hidden: 512.0 bytes" in one.charts[0].description
    assert one.terms == [("VSD", "topk + hidden", ["+0.01 %", "0.30°", "–", "0.30°"])]


def test_marks_and_labels_stay_inside_and_apart():
    ways = [
        stored(f"top-{k} + sketch {step}", 5 + k + 3 / step, step * 20 / k)
        for k in (4, 8, 16)
        for step in (0.4, 0.1, 0.02)
    ]
    (chart,) = drawn(*ways).charts
    boxes = []
    for mark in chart.marks:
        assert LEFT <= mark.x <= WIDTH - RIGHT and TOP <= mark.y <= HEIGHT - BOTTOM
        if mark.text:
            x, y, anchor = mark.text
            left = x if anchor == "start" else x - 5.6 * len(mark.label)
            boxes.append((left, y - 10, left + 5.6 * len(mark.label), y + 3))
    assert boxes and all(left >= LEFT and right <= WIDTH for left, _, right, _ in boxes)
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
    numbers = list(map(float, re.findall(r"[\d.]+", chart.front)))
    assert max(numbers) <= WIDTH


def test_an_angle_of_nothing_is_drawn_on_the_floor():
    (chart,) = drawn(stored("a", 10, 0.0), stored("b", 20, 0.0), stored("c", 5, 1.0)).charts
    assert chart.floor is not None and [mark.y for mark in chart.marks].count(chart.floor) == 2
    assert {mark.label for mark in chart.marks if mark.best} == {"a", "c"}
    assert not drawn(stored("a", 10, math.nan), stored("b", 20, 1.0)).charts[0].title.endswith("KL")


def candidate(label: str, size: float, kl: float, angle: float, error: str = "", **fields) -> dict:
    angles = {} if math.isnan(angle) else {"forward": angle, "reverse": angle}
    own = {"kind": "vision", "label": label, "fields": fields, "bytes_per_row": size, "kl": kl, "head_angles": angles}
    return own | {"error": error}


def test_a_preflight_is_found_beside_its_cache_and_says_what_it_chose(tmp_path):
    sketched = {"vision_topk": {"k": 4}, "vision_hidden": {"codec": "sketch", "step": 0.1}}
    ladder = [
        candidate("top-4 + sketch 0.1", 15.0, 0.01, 2.0, **sketched),
        candidate("top-8 + sketch 0.1", 19.0, 0.001, 0.8, **sketched),
        candidate("int8 hidden", 261.0, math.nan, math.nan, **sketched),  # nobody had to measure it
        candidate("bf16 hidden", 0.0, math.nan, math.nan, "too few rows", **sketched),
    ]
    choice = {"kind": "vision", "label": "top-8 + sketch 0.1", "fields": sketched, "ladder": ladder, "reasons": []}
    (tmp_path / NOTEBOOK).write_bytes(seal({"identity": {}, "found": {"choices": [choice]}}))
    assert beside(str(tmp_path / "cache")) == [f"{tmp_path}/{NOTEBOOK}"] and beside(str(tmp_path)) == []
    for given in (tmp_path, f"{tmp_path}/{NOTEBOOK}"):
        (one,) = frontiers(read_fidelity([given]))
        assert [(row.label, row.own) for row in one.rows] == [
            ("top-4 + sketch 0.1", False),
            ("top-8 + sketch 0.1", True),
        ]
        assert len(one.charts) == 2
    (tmp_path / NOTEBOOK).write_bytes(seal({"identity": {}, "found": {}}))
    assert frontiers(read_fidelity([tmp_path])) == [], "it has only begun"


@pytest.mark.parametrize(
    "text", ["", "[1]", "{}", json.dumps({"distributions": {"a": 1}}), '{"found": {"choices": [{}]}}']
)
def test_another_file_is_refused_in_one_line(tmp_path, text):
    file = tmp_path / "other.json"
    file.write_text(text)
    with pytest.raises(KdcliError, match=r"other.json.*kdcli fidelity --out FILE.json"):
        read_fidelity([file])
    with pytest.raises(KdcliError, match=r"none.json: cannot be read"):
        read_fidelity([tmp_path / "none.json"])
