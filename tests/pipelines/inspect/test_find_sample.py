"""One row of a cache by what a user has of it, and the cache by ``--cache`` wherever it has a place of its own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from cli import main
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.reading.cached_samples import CachedSamples


def run(*words: object) -> Result:
    return CliRunner().invoke(main, ["cache", *map(str, words)])


def refused(result: Result, said: str) -> None:
    assert result.exit_code != 0 and isinstance(result.exception, SystemExit), (result.output, result.exception)
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("Error: "))
    assert re.search(said, line), line


@pytest.fixture(scope="module")
def skipping(world_json: Any, make_request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of one part, ``sft``, that left 6 of 24 rows out, and has every field but for these rows."""
    from pipelines.capture.cache_teacher import capture
    from teacher_cache.sources import DataSpec

    out = tmp_path_factory.mktemp("skipping") / "cache"
    data = (DataSpec("sft", str(world_json.train), image_root=str(world_json.images), template="chat"),)
    capture(make_request(out, data=data, shards=3, fields=("response_topk",)))
    return out


def test_by_row_and_id_of_the_data(skipping: Path, world_json: Any) -> None:
    data = json.loads(Path(world_json.train).read_text())
    cache = TeacherCache(str(skipping))
    skips = [skip for shard in range(3) for skip in cache.column("samples").commit(shard).skipped]
    assert skips
    left_out = {skip.ordinal: skip for skip in skips}
    for number in (number for number in range(len(data)) if number not in left_out):
        shown = run("inspect", skipping, "--source-row", number)
        assert shown.exit_code == 0 and shown.stdout.startswith(f"{number:09d}-"), shown.output
        if number < 6:
            assert run("inspect", skipping, "--id", data[number]["id"], "--part", "sft").stdout == shown.stdout
    for number, skip in left_out.items():
        refused(
            run("inspect", skipping, "--source-row", number),
            f"row {number} is not in it: .*was skipped .{skip.reason}: ",
        )
    skip = skips[0]
    refused(run("inspect", skipping, "--id", skip.source_id), f"no sample with id .*was skipped .{skip.reason}: ")
    refused(run("inspect", skipping, "--source-row", 24), "row 24 is not in it$")
    refused(run("inspect", skipping, "--id", "nobody"), "no sample with id 'nobody'$")
    refused(run("inspect", skipping, "--source-row", 1, "--part", "caption"), "no part 'caption'; it has sft")


def test_parts_have_rows_of_the_same_number(tiny_cache: Path) -> None:
    refused(run("inspect", tiny_cache, "--source-row", 3), "parts caption, sft each have a row 3: give --part as well")
    for part in ("caption", "sft"):
        assert f"part {part} " in run("inspect", tiny_cache, "--source-row", 3, "--part", part).stdout
    assert "part sft " in run("inspect", tiny_cache, "--source-row", 15).stdout, "only one part has so many"


def test_one_way_to_choose(tiny_cache: Path) -> None:
    refused(run("inspect", tiny_cache, "--row", 0, "--id", "x"), "--row and --id each select a row")
    refused(run("inspect", tiny_cache, "--row", -1), "--row counts from 0, got -1")
    refused(run("inspect", tiny_cache, "--source-row", -1), "--source-row counts from 0, got -1")
    first = CachedSamples(TeacherCache(str(tiny_cache)), TeacherCache(str(tiny_cache)).parts(), []).key(0, 0)
    assert run("inspect", tiny_cache).stdout.startswith(first)


def filled(words: list[str], name: str) -> list[str]:
    return [word.format(out=name) for word in words]


@pytest.mark.parametrize(
    "words",
    [
        ["status"],
        ["verify"],
        ["inspect"],
        ["gc"],
        ["urls"],
        ["urls", "response_topk"],
        ["drop-field", "response_topk"],
        ["subset", "--out", "{out}", "--max-rows", "2"],
        ["repair", "--dry-run"],
        ["add-field", "--field", "response_topk"],
    ],
    ids=" ".join,
)
def test_the_cache_by_its_flag(
    words: list[str], tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``--cache`` says what the place behind the command says; both are too many."""
    monkeypatch.chdir(tmp_path)
    command, *rest = words
    placed = run(command, tiny_cache, *filled(rest, "out"))
    flagged = run(command, "--cache", tiny_cache, *filled(rest, "other"))
    assert (flagged.exit_code, flagged.stdout, flagged.stderr) == (placed.exit_code, placed.stdout, placed.stderr)
    assert "no cache" not in placed.output
    twice = run(command, tiny_cache, *(rest or (["samples"] if command == "urls" else [])), "--cache", tiny_cache)
    assert twice.exit_code == 2 and re.search("name (the cache once|one cache)", twice.stderr), twice.output
