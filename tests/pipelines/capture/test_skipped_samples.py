"""Rows that cannot be used: a part of them stops a capture before it begins, or fails it; those whose cause is gone are taken in."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cli import main
from pipelines.capture.cache_teacher import capture
from pipelines.capture.skipped_samples import is_excess, share
from pipelines.capture.worker import CaptureRequest
from pipelines.inspect.cache import check, collect_garbage
from teacher_cache.errors import CacheError, KdcliError
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.reading.cached_samples import CachedSamples
from teacher_cache.sources import DataSpec

ROWS = 10
FIELDS = ("response_hidden", "vision_hidden")


@pytest.mark.parametrize(
    ("skipped", "rows", "allowed", "said"),
    [
        *[(k, 6, 0.05, said) for k, said in ((0, False), (1, False), (3, False), (4, True), (6, True))],
        *[(k, 128, 0.05, said) for k, said in ((6, False), (12, False), (18, True), (128, True))],
        *[(k, 665_298, 0.05, said) for k, said in ((33_264, False), (33_500, False), (35_000, True))],
        *[(1, n, 0.0, True) for n in (2, 665_298)],
        *[(0, 6, 0.0, False), (6, 6, 1.0, False), (1, 1, 0.05, True), (2, 2, 0.5, True), (0, 0, 0.05, False)],
    ],
)
def test_how_many_skips_are_too_many(skipped: int, rows: int, allowed: float, said: bool) -> None:
    assert is_excess(skipped, rows, allowed) is said
    if rows:
        assert not is_excess(skipped, rows, share(skipped, rows))


@pytest.fixture
def images(world: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(world.images, tmp_path / "images"))


@pytest.fixture
def asked(make_request, world: Any, images: Path, tmp_path: Path) -> Callable[..., CaptureRequest]:
    """``asked(out)``: the captions in two shards, pictures from ``images``."""

    def make(out: str = "cache", again: bool = False, **settings: Any) -> CaptureRequest:
        spec = DataSpec("caption", str(world.captions), image_root=str(images), template="plain")
        given = {"shards": 2, "fields": FIELDS, "data": [spec], **settings}
        return replace(make_request(tmp_path / out, **given), retry_skipped=again)

    return make


@pytest.fixture
def hide(world: Any, images: Path, tmp_path: Path) -> Callable[..., Callable[[], None]]:
    """``hide(rows)`` takes the pictures of rows away; what it returns brings them back."""
    names = [row["image"] for row in json.loads(Path(world.captions).read_text())]

    def take(*rows: int) -> Callable[[], None]:
        (tmp_path / "away").mkdir(exist_ok=True)
        for row in rows:
            shutil.move(images / names[row], tmp_path / "away" / str(row))

        def bring() -> None:
            for row in rows:
                shutil.move(tmp_path / "away" / str(row), images / names[row])

        return bring

    return take


def tree(folder: Path) -> dict[str, bytes]:
    files = (f for f in sorted(folder.rglob("*")) if f.is_file() and not {".staging", "progress"} & set(f.parts))
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


def without_manifest(folder: Path) -> dict[str, bytes]:
    """It tells which pictures were there when the cache was begun."""
    return {name: data for name, data in tree(folder).items() if name != "manifest.json"}


def run(*words: str) -> Any:
    return CliRunner().invoke(main, ["cache-teacher", *words, "--device", "cpu", "--dtype", "float32"])


@pytest.fixture
def weightless(tiny_teacher: Path, tmp_path: Path) -> Path:
    """A teacher that cannot be loaded: what is refused is refused before."""
    folder = Path(shutil.copytree(tiny_teacher, tmp_path / "weightless"))
    (folder / "model.safetensors").write_bytes(b"no weights")
    return folder


def test_a_forgotten_image_root_stops_before_the_job(world: Any, weightless: Path, tmp_path: Path) -> None:
    data = Path(shutil.copy(world.captions, tmp_path / "captions.json"))
    words = ["--teacher", str(weightless), "--data", str(data), "--template", "plain", "--shards", "2"]
    said = run(*words, "--out", str(tmp_path / "cache"))
    assert said.exit_code == 1 and not (tmp_path / "cache").exists()
    (line,) = said.output.strip().splitlines()
    assert "part 'caption': of 10 checked rows, 10 are skipped: 10 by image_missing (captions.json row 0" in line
    assert "--image-root" in line and "--allow-skips 1 " in line
    (tmp_path / "kd.toml").write_text("[capture]\nallow_skips = 1.0\nfields = []\nstore = 'none'\n")
    said = run(*words, "--out", str(tmp_path / "cache"), "--config", str(tmp_path / "kd.toml"))
    assert said.exit_code == 0, said.output


@pytest.mark.parametrize(("pictured", "stops"), [(1, False), (2, False), (3, True), (10, True)])
def test_pictures_are_counted_among_the_rows_that_have_some(
    make_request, tmp_path: Path, pictured: int, stops: bool
) -> None:
    """Among many rows of text a forgotten image root is few rows; one or two bad rows are no verdict."""
    turns = [{"from": "human", "value": "Is it?"}, {"from": "gpt", "value": "yes"}]
    seeing = [{"from": "human", "value": "<image>\nIs it?"}, turns[1]]
    rows: list[dict[str, Any]] = [{"id": str(n), "conversations": turns} for n in range(100)]
    rows += [{"id": "p", "image": f"{n}.png", "conversations": seeing} for n in range(pictured)]
    data = tmp_path / "rows.json"
    data.write_text(json.dumps(sorted(rows, key=lambda row: hash_of(row))))
    request = make_request(tmp_path / "c", data=[DataSpec("sft", str(data))], shards=1, fields=(), store="none")
    if stops:
        with pytest.raises(KdcliError, match=r"image_missing .*--allow-skips 1 would"):
            capture(request)
    else:
        assert capture(request)["columns"]["samples"]["skipped"] == {"image_missing": pictured}


def hash_of(row: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(row).encode()).hexdigest()


def test_rows_too_long_stop_before_the_job_and_name_the_limit(asked, weightless: Path, tmp_path: Path) -> None:
    with pytest.raises(KdcliError, match=r"10 are skipped: 10 by over_length .* raise --max-length"):
        capture(asked(max_length=20, teacher=weightless))
    assert not (tmp_path / "cache").exists()


def test_one_bad_row_does_not_stop_a_small_job(asked, hide) -> None:
    hide(3)
    summary = capture(asked(fields=("response_topk",)))
    assert summary["columns"]["samples"]["skipped"] == {"image_missing": 1} and "excess" not in summary
    with pytest.raises(KdcliError, match=r"of 10 checked rows, 1 are skipped: 1 by image_missing"):
        capture(asked("strict", allow_skips=0.0))


def test_defects_of_the_data_are_counted_behind_the_job_unless_nearly_all_rows_have_one(
    make_request, tmp_path: Path
) -> None:
    """Half of the rows, for reasons that no flag mends: captured, and said. All of them: not begun."""

    def asked(bad: int) -> CaptureRequest:
        answers = ["" if number < bad else "yes" for number in range(20)]
        turns = [[{"from": "human", "value": "Is it?"}, {"from": "gpt", "value": answer}] for answer in answers]
        data = tmp_path / f"{bad}.json"
        data.write_text(json.dumps([{"id": str(n), "conversations": one} for n, one in enumerate(turns)]))
        spec = DataSpec("sft", str(data))
        return make_request(tmp_path / f"c{bad}", data=[spec], shards=1, fields=(), store="none")

    summary = capture(asked(10))
    assert summary["columns"]["samples"]["written"] == 10
    line, kept = summary["excess"]
    assert "the cache is kept; --retry-skipped" in kept
    assert "10 of 20 rows are skipped in samples, 10 by empty_answer (10.json row 0" in line
    assert "--allow-skips 0.5 " in line and "kdcli doctor" in line
    with pytest.raises(KdcliError, match=r"of 20 checked rows, 19 are skipped: 19 by empty_answer"):
        capture(asked(19))


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_is_from_0_to_1(asked, share: float) -> None:
    with pytest.raises(KdcliError, match="--allow-skips"):
        asked(allow_skips=share)


def test_too_many_skips_fail_the_command_and_keep_the_cache(
    asked, tiny_teacher: Path, world: Any, images: Path, tmp_path: Path
) -> None:
    """Only the teacher shows them: its answers are not finite. The same command again says the same, and so does the finished one."""
    from transformers import AutoModelForImageTextToText

    broken = Path(shutil.copytree(tiny_teacher, tmp_path / "broken"))
    model = AutoModelForImageTextToText.from_pretrained(tiny_teacher)
    model.model.language_model.layers[1].mlp.down_proj.weight.data.fill_(float("nan"))
    model.save_pretrained(broken)
    words = ["--teacher", str(broken), "--data", str(world.captions), "--template", "plain", "--shards", "2"]
    words += ["--image-root", str(images), "--out", str(tmp_path / "cache"), "--fields", "relation"]
    for _ in range(2):
        said = run(*words)
        assert said.exit_code == 1
        assert "10 of 10 rows are skipped in fields/relation, 10 by nonfinite_teacher" in said.output
    assert check(TeacherCache(str(tmp_path / "cache"))) == []
    assert run(*words, "--allow-skips", "1").exit_code == 0
    adding = ["cache", "add-field", str(tmp_path / "cache"), "--field", "affinity", "--set", "layout=dense"]
    said = CliRunner().invoke(main, [*adding, "--teacher", str(broken), "--device", "cpu"])
    assert said.exit_code == 1 and "10 of 10 rows are skipped in fields/affinity" in said.output


@pytest.mark.usefixtures("one_thread")
def test_rows_whose_cause_is_gone_are_taken_in(asked, hide, tmp_path: Path) -> None:
    """Byte by byte what a capture would have made that had had them from the beginning."""
    capture(asked("whole"))
    bring = hide(1, 6)
    first = capture(asked())
    assert first["columns"]["samples"]["skipped"] == {"image_missing": 2}
    again = capture(asked(again=True))
    assert again["notes"] == ["no row that was skipped can be used now"]
    bring()
    assert capture(asked()) == first, "it is finished; rows are taken in when that is asked for"
    summary = capture(asked(again=True))
    assert summary["notes"][0].startswith("2 rows added, ") and "notes" not in first
    for column in summary["columns"].values():
        assert (column["written"], column["skipped"]) == (ROWS, {})
    cache = TeacherCache(str(tmp_path / "cache"))
    assert sum(CachedSamples(cache, ["caption"], FIELDS).counts) == ROWS
    collect_garbage(cache, remove=True)
    assert without_manifest(tmp_path / "cache") == without_manifest(tmp_path / "whole") and check(cache) == []
    assert capture(asked(again=True))["notes"] == ["no row that was skipped can be used now"]


@pytest.mark.usefixtures("one_thread")
def test_a_kill_between_any_two_writes_while_rows_are_taken_in(asked, hide, make_mortal, tmp_path: Path) -> None:
    capture(asked("whole"))
    bring = hide(1, 6)
    capture(asked())
    bring()
    before = {key for key in rows_of(tmp_path / "cache")}

    def no_row_is_lost() -> None:
        assert check(TeacherCache(str(tmp_path / "cache"))) == []
        assert before <= set(rows_of(tmp_path / "cache"))

    mortal = make_mortal("put_file", "put_new")
    assert mortal.until_done(lambda: capture(asked(again=True)), 5, no_row_is_lost) >= 3
    collect_garbage(TeacherCache(str(tmp_path / "cache")), remove=True)
    assert without_manifest(tmp_path / "cache") == without_manifest(tmp_path / "whole")


def rows_of(folder: Path) -> list[str]:
    """Keys of the rows that all columns hold."""
    rows = CachedSamples(TeacherCache(str(folder)), ["caption"], FIELDS)
    return [rows.key(position, row) for position, count in enumerate(rows.counts) for row in range(count)]


def test_rows_that_are_captured_are_not_given_up_for_others(asked, hide, tmp_path: Path) -> None:
    bring = hide(1)
    capture(asked())
    before = tree(tmp_path / "cache")
    bring()
    hide(*(row for row in range(ROWS) if row != 1))
    with pytest.raises((CacheError, KdcliError)):
        capture(asked(again=True, allow_skips=1.0))
    assert tree(tmp_path / "cache") == before


def test_a_lost_row_is_seen_where_no_picture_was_bound(asked, hide, tmp_path: Path, monkeypatch) -> None:
    """The rows of the shard itself are asked."""
    monkeypatch.setattr("teacher_cache.planning.same_samples.MOST_PICTURED", 0)
    bring = hide(1)
    capture(asked(shards=1))
    before = tree(tmp_path / "cache")
    bring()
    hide(2)
    with pytest.raises(CacheError, match=r"row 2 is captured .* cannot be used here \(image_missing"):
        capture(asked(shards=1, again=True))
    assert tree(tmp_path / "cache") == before


def test_fields_of_other_commands_are_named(asked, hide, tmp_path: Path) -> None:
    bring = hide(1)
    capture(asked())
    bring()
    notes = capture(asked(again=True, fields=("response_hidden",)))["notes"]
    assert notes[1] == "vision_hidden: without the rows taken in; name them with --fields and --retry-skipped, too"
    notes = capture(asked(again=True, fields=("vision_hidden",)))["notes"]
    assert "1 shard made again" in notes[0] and len(rows_of(tmp_path / "cache")) == ROWS
