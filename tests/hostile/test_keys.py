"""Odd names and odd mixtures: captured, verified, read back and trained where they are legal, one clear line where they are not; and
nothing that data brings drives the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from click.testing import CliRunner

import cli
from benchmarks.fuzz_targets import Folder
from pipelines.capture import heartbeat
from pipelines.capture.cache_teacher import capture
from pipelines.inspect.cache import check, status
from pipelines.settings import Settings
from pipelines.train.train_student import train
from student_train.config import TrainSettings
from teacher_cache.errors import KdcliError, one_line, printable
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.reading.cached_samples import CachedSamples
from teacher_cache.sources import DataSpec

ODD_IDS = [
    "",
    "a\nb",
    "../../x",
    "a/b\\c.d",
    "x" * 10_000,
    "\u202eevil",
    "\x1b[2J\x07",
    "\u2028",
    "🦊",
    "a",
    "a",
    None,
    7,
    1.5,
]
"""As the dataset's own ids, two of them equal."""
ODD_NAMES = ["ä 1.png", "a\nb.png", "sub/🦊.png", "\u202egnp.a", "x\x1b[31m.png", " .png", "a.b.c", "n" * 200]
"""Of image files."""
PART = "sft é [bold]\\"


def rows(root: Path) -> list[dict[str, Any]]:
    """Every odd id with every odd image name in turn; rows of an image alone, of text alone, and two rows that are the same."""
    found: list[dict[str, Any]] = []
    for number, one in enumerate(ODD_IDS):
        name = ODD_NAMES[number % len(ODD_NAMES)]
        (root / name).parent.mkdir(exist_ok=True)
        PIL.Image.new("RGB", (96, 96), (number * 9, 40, 90)).save(root / name, "PNG")
        talk = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": f"a \x1b[31m square {number}"}]
        found.append({"id": one, "image": name, "conversations": talk, "\u202e": "\x1b"})
    text = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "good day"}]
    return [*found, {"id": "text", "conversations": text}, found[0], found[0]]


@pytest.fixture(scope="module")
def odd(make_request, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """(cache of ``rows``, the rows)"""
    root = tmp_path_factory.mktemp("odd")
    written = rows(root)
    (root / "rows\u202e.json").write_text(json.dumps(written))
    data = [DataSpec(PART, str(root / "rows\u202e.json"), image_root=str(root))]
    out = root / "cache"
    capture(make_request(out, data=data, shards=3, fields=("response_topk", "vision_topk")))
    return out, written


def test_they_are_captured_verified_and_read_back(odd: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, written = odd
    cache = TeacherCache(str(folder))
    assert check(cache) == [] and cache.parts() == [PART]
    assert status(cache)["columns"]["samples"]["written"] == len(written)
    found = CachedSamples(cache, [PART], list(cache.fields))
    every = {
        one.sample.ordinal: one for p, n in enumerate(found.counts) for one in (found.read(p, r) for r in range(n))
    }
    assert len({one.key for one in every.values()}) == len(written), "keys of equal rows differ by their ordinal"
    for ordinal, row in enumerate(written):
        sample = every[ordinal].sample
        assert sample.source_id == ("" if row["id"] is None else str(row["id"]))
        assert [image.name for image in sample.images] == ([row["image"]] if "image" in row else [])
        assert sample.turns[-1].text == row["conversations"][-1]["value"]


def test_they_are_trained(odd: tuple[Path, list[dict[str, Any]]], tiny_student: Path, tmp_path: Path) -> None:
    folder, _ = odd
    settings = TrainSettings(str(tiny_student), str(tmp_path / "run"), 2, max_steps=2, report_to="none")
    from student_train.config import StageSettings

    stages = {"SFT": StageSettings(parts=(PART,))}
    result = train(str(folder), "sft", Settings(train=settings, stages=stages), stages="SFT")
    assert result["stages"][0]["steps"] == 2


def test_what_they_bring_cannot_drive_the_terminal(odd: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    folder, _ = odd
    path = folder.parent / "rows\u202e.json"
    broken = tmp_path / "x\x1b[2J\u202e.json"
    broken.write_text('[{"id":}]')
    asked = [
        ["cache", "inspect", str(folder), "--row", "3"],
        ["cache", "status", str(folder)],
        ["cache", "verify", str(folder)],
        ["cache", "urls", str(folder)],
        ["cache", "urls", str(folder), "no such\x1b[2J field"],
        ["doctor", str(path), "--part", PART, "--image-root", str(tmp_path)],
        ["doctor", str(path), "--part", PART, "--image-root", str(tmp_path), "--json"],
        ["doctor", str(broken)],
        ["train-student", "--cache", str(folder), "--student", str(tmp_path / "\x1b[2J"), "--method", "sft"],
    ]
    for command in asked:
        found = CliRunner().invoke(cli.main, command)
        assert found.exception is None or isinstance(found.exception, SystemExit), command
        assert found.output == printable(found.output), command
        if "--json" in command:
            assert json.loads(found.stdout)["rows"] == len(ODD_IDS) + 3
    assert "\\u001b[31m square" in CliRunner().invoke(cli.main, asked[0]).output


def test_what_a_worker_says_cannot_either() -> None:
    folder = Folder()
    word = heartbeat.Word("w", "host\x1b[2J", 0.0, 1.0, 3, error="one\nfailed: two\x1b]0;title\x07")
    folder.write("progress/w.json", json.dumps(vars(word)).encode())
    found = CliRunner().invoke(cli.main, ["cache", "status", str(folder.path)])
    assert found.exit_code == 0 and "host\\u001b[2J" in found.output and found.output == printable(found.output)


def test_what_is_shown_of_a_character() -> None:
    assert printable("a\tb\nc ß 🦊 é") == "a\tb\nc ß 🦊 é"
    assert (
        printable("\x1b\x9b\x07\r\x7f\u202e\u2066\u2028\ud800")
        == r"\u001b\u009b\u0007\u000d\u007f\u202e\u2066\u2028\ud800"
    )
    assert json.loads(printable(json.dumps("\x9b\u202e", ensure_ascii=False))) == "\x9b\u202e", "JSON stays what it is"
    assert one_line(ValueError("a\n  b\x1b")) == r"a b\u001b"


@pytest.mark.parametrize("part", ["", " ", "a\nb", "\x1b[2J", "\u202e", "\ud800"])
def test_a_part_needs_a_name_that_can_be_shown(make_request, world_json: Any, tmp_path: Path, part: str) -> None:
    data = [DataSpec(part, str(world_json.captions), image_root=str(world_json.images), template="plain")]
    with pytest.raises(KdcliError, match="part"):
        capture(make_request(tmp_path / "out", data=data, shards=1, fields=()))
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_mixture_of_no_rows_and_a_shard_of_one(make_request, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text("[]")
    with pytest.raises(KdcliError, match="holds no rows"):
        capture(make_request(tmp_path / "none", data=[DataSpec("sft", str(path))], shards=1, fields=()))
    talk = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "good day"}]
    path.write_text(json.dumps([{"id": 1, "conversations": talk}]))
    capture(make_request(tmp_path / "one", data=[DataSpec("sft", str(path))], shards=1, fields=("response_topk",)))
    cache = TeacherCache(str(tmp_path / "one"))
    assert check(cache) == [] and CachedSamples(cache, ["sft"], ["response_topk"]).read(0, 0).sample.source_id == "1"
