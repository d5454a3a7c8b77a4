"""A cache goes on with the pictures that it was begun with, or says which row has others."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import PIL.Image
import PIL.ImageOps
import pytest
from click.testing import CliRunner

from cli import main
from pipelines.capture.cache_teacher import capture
from pipelines.capture.worker import CaptureRequest
from pipelines.edit.repair import RepairRequest, repair
from pipelines.inspect.cache import check
from teacher_cache.errors import CacheError, DataError
from teacher_cache.planning import same_samples
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.reading.cached_samples import CachedSamples
from teacher_cache.shards.storage import Storage
from teacher_cache.sources import DataSpec, open_source
from teacher_cache.sources.usable_samples import row_key

ROWS = 10


def other_picture(file: Path) -> None:
    """Another picture, by one bit less of every colour: of the same kind, size and name."""
    with PIL.Image.open(file) as opened:
        picture, kind = PIL.ImageOps.posterize(opened.convert("RGB"), 2), opened.format
    buffer = BytesIO()
    picture.save(buffer, kind)
    file.write_bytes(buffer.getvalue())


@pytest.fixture
def roots(world: Any, tmp_path: Path) -> tuple[Path, Path]:
    """(the pictures of ``world``, the same names with other pictures)"""
    one, other = (Path(shutil.copytree(world.images, tmp_path / name)) for name in ("one", "other"))
    for file in filter(Path.is_file, other.rglob("*")):
        other_picture(file)
    return one, other


@pytest.fixture
def asked(make_request, world: Any, tmp_path: Path) -> Callable[..., CaptureRequest]:
    """``asked(root, part_of_shards)``: the captions in two shards, pictures from there; (0, 2) is a capture killed half-way."""

    def make(root: Path, part: tuple[int, int] | None = None, **settings: Any) -> CaptureRequest:
        spec = DataSpec("caption", str(world.captions), image_root=str(root), template="plain")
        given = {"shards": 2, "fields": ("response_topk",), "data": [spec], **settings}
        return replace(make_request(tmp_path / "cache", **given), part_of_shards=part)

    return make


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_a_resume_with_other_pictures_is_refused_naming_a_row_and_both_sides(asked, roots, tmp_path: Path) -> None:
    one, other = roots
    capture(asked(one, (0, 2)))
    before = files(tmp_path / "cache")
    with pytest.raises(CacheError) as caught:
        capture(asked(other))
    said = str(caught.value)
    assert "row 0 of part 'caption' has other pictures" in said and str(one) in said and str(other) in said
    assert files(tmp_path / "cache") == before
    assert capture(asked(Path(shutil.copytree(one, tmp_path / "moved"))))["columns"]["samples"]["written"] == ROWS


@pytest.mark.parametrize("row", [0, 4, ROWS - 1])
def test_one_replaced_file_is_found_in_whatever_shard_its_row_is(asked, roots, world: Any, row: int) -> None:
    one, _ = roots
    capture(asked(one, (0, 2)))
    name = json.loads(Path(world.captions).read_text())[row]["image"]
    other_picture(one / name)
    with pytest.raises(CacheError, match=f"row {row} of part 'caption' has other pictures"):
        capture(asked(one))


def test_pictures_that_are_gone_are_no_skip_records(asked, roots, world: Any) -> None:
    one, _ = roots
    capture(asked(one, (0, 2)))
    (one / json.loads(Path(world.captions).read_text())[3]["image"]).unlink()
    with pytest.raises(CacheError, match=r"row 3 .* had pictures under .* and has none under"):
        capture(asked(one))


def test_a_capture_killed_before_its_first_shard_is_bound_too(asked, roots) -> None:
    one, other = roots
    capture(replace(asked(one), prepare_only=True))
    with pytest.raises(CacheError, match="has other pictures"):
        capture(asked(other))


def test_a_complete_cache_needs_no_pictures_and_takes_no_others(asked, roots, tmp_path: Path) -> None:
    one, other = roots
    first = capture(asked(one))
    with pytest.raises(CacheError, match="has other pictures"):
        capture(asked(other))
    shutil.rmtree(one)
    os.environ["KDCLI_MEMORY"], before = str(tmp_path / "none"), os.environ["KDCLI_MEMORY"]
    try:
        assert capture(asked(one)) == first
    finally:
        os.environ["KDCLI_MEMORY"] = before


def test_a_field_added_beside_samples_has_their_rows(asked, roots, world: Any, monkeypatch) -> None:
    """Row by row, also where no probe falls on the one that changed."""
    one, _ = roots
    monkeypatch.setattr(same_samples, "MOST_PICTURED", 1)
    capture(asked(one))
    name = json.loads(Path(world.captions).read_text())[ROWS - 1]["image"]
    other_picture(one / name)
    with pytest.raises(CacheError, match=rf"row {ROWS - 1} is another row here \(.*\) than the one that is captured"):
        capture(asked(one, fields=("response_topk", "vision_topk")))
    (one / name).unlink()
    with pytest.raises(CacheError, match=rf"row {ROWS - 1} is captured .* cannot be used here \(image_missing"):
        capture(asked(one, fields=("response_topk", "vision_topk")))


def test_a_field_leaves_out_what_samples_skips(asked, roots, world: Any, tmp_path: Path) -> None:
    """A picture that came later is taken in by all columns of a shard or by none."""
    one, _ = roots
    name = json.loads(Path(world.captions).read_text())[5]["image"]
    shutil.move(one / name, tmp_path / "away")
    capture(asked(one))
    shutil.move(tmp_path / "away", one / name)
    summary = capture(asked(one, fields=("response_topk", "vision_topk")))
    for column in summary["columns"].values():
        assert (column["written"], column["skipped"]) == (ROWS - 1, {"image_missing": 1})


def test_messages_are_bound_as_well(make_request, roots, world: Any, tmp_path: Path) -> None:
    one, other = roots
    lines = [
        {"messages": [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": str(n)}], "images": [row["image"]]}
        for n, row in enumerate(json.loads(Path(world.captions).read_text()))
    ]  # fmt: skip
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)))

    def asked(root: Path, part: tuple[int, int] | None) -> CaptureRequest:
        spec = DataSpec("sft", str(data), image_root=str(root))
        return replace(
            make_request(tmp_path / "c", data=[spec], shards=2, fields=(), store="none"), part_of_shards=part
        )

    capture(asked(one, (0, 2)))
    with pytest.raises(CacheError, match="has other pictures"):
        capture(asked(other, (1, 2)))


def test_two_workers_of_other_pictures_do_not_mix(asked, roots, tmp_path: Path, monkeypatch) -> None:
    """The slower one of a shard writes nothing beside samples that are not its own."""
    from teacher_cache.shards.commit import committed_shards
    from teacher_cache.shards.writer import ShardWriter

    one, other = roots
    real = ShardWriter.commit

    def late(writer: ShardWriter) -> Any:
        if writer.column == "samples":
            monkeypatch.setattr(ShardWriter, "commit", real)
            capture(asked(other, (0, 2), fields=(), store="none"))
        return real(writer)

    monkeypatch.setattr(same_samples, "refuse_other_pictures", lambda *_: None)
    monkeypatch.setattr("pipelines.capture.cache_teacher.refuse_other_pictures", lambda *_: None)
    monkeypatch.setattr(ShardWriter, "commit", late)
    with pytest.raises(CacheError, match="shard 000000 was captured meanwhile by another worker, with other rows"):
        capture(asked(one, (0, 2)))
    assert committed_shards(Storage(str(tmp_path / "cache")), "fields/response_topk") == []


def test_a_mixture_that_changes_while_it_is_read_is_not_captured(asked, roots, world: Any, tmp_path: Path) -> None:
    """Another answer of the same length; a new time of the file alone is no change."""
    one, _ = roots
    data = Path(shutil.copy(world.captions, tmp_path / "captions.json"))
    request = asked(one)
    request = replace(request, data=(replace(request.data[0], path=str(data)),))

    def touch(event: str, *_: Any) -> None:
        if event == "start":
            os.utime(data, ns=(0, data.stat().st_mtime_ns + 1))

    def edit(event: str, *_: Any) -> None:
        if event == "start":
            data.write_text(data.read_text().replace('"gpt"', '"GPT"'))

    with pytest.raises(DataError, match=r"captions\.json changed while it was captured"):
        capture(replace(request, out=str(tmp_path / "edited")), edit)
    assert not list((tmp_path / "edited").rglob("commits/*.json"))
    data.write_text(data.read_text().replace('"GPT"', '"gpt"'))
    assert capture(request, touch)["columns"]["samples"]["written"] == ROWS


def test_repair_takes_no_other_pictures(asked, roots, tmp_path: Path) -> None:
    """Neither for a shard, whatever bytes it may take, nor for a manifest."""
    one, other = roots
    capture(asked(one))
    made = asked(other)

    def mend() -> list[dict[str, Any]]:
        request = RepairRequest(str(tmp_path / "cache"), made.teacher, made.data, made.settings, {}, replace=True)
        return repair(request)["left"]

    broken = next((tmp_path / "cache").glob("samples/data/000001*"))
    broken.write_bytes(broken.read_bytes()[:-1])
    (left,) = mend()
    assert "has other pictures" in left["why"]
    (tmp_path / "cache" / "manifest.json").unlink()
    with pytest.raises(CacheError, match=r"has other pictures under .*other"):
        mend()
    made = asked(one)
    assert mend() == [] and check(TeacherCache(str(tmp_path / "cache"))) == []


def test_the_keys_in_a_manifest_are_those_of_its_rows_and_no_part_of_the_plan(asked, roots, tmp_path: Path) -> None:
    one, _ = roots
    request = asked(one)
    capture(request)
    cache = TeacherCache(str(tmp_path / "cache"))
    rows = CachedSamples(cache, ["caption"], [])
    keys = {rows.key(at, row) for at, count in enumerate(rows.counts) for row in range(count)}
    assert set(cache.plan.parts[0].pictures) == keys
    source = open_source(request.data[0])
    assert keys == {row_key(row) for group in source.scan(100) for row in source.read(group)}
    bare = replace(cache.plan, parts=tuple(replace(part, pictures=()) for part in cache.plan.parts))
    assert bare.plan_hash == cache.plan_hash


def test_the_command_says_it_in_one_line(asked, roots, tiny_teacher: Path, world: Any, tmp_path: Path) -> None:
    one, other = roots
    capture(asked(one, (0, 2)))
    words = ["cache-teacher", "--teacher", str(tiny_teacher), "--data", str(world.captions), "--template", "plain"]
    words += ["--out", str(tmp_path / "cache"), "--shards", "2", "--fields", "response_topk", "--k", "8"]
    said = CliRunner().invoke(main, [*words, "--device", "cpu", "--dtype", "float32", "--image-root", str(other)])
    assert said.exit_code == 1
    (line,) = [line for line in said.output.splitlines() if "Error" in line]
    assert "has other pictures" in line and "--image-root" in line
