"""Fields added to and dropped from a cache that is there: nothing else of it changes, and a kill at any moment is mended by a rerun."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
import torch
from click.testing import CliRunner

from cli import main
from pipelines.capture.cache_teacher import capture
from pipelines.edit.fields import add_fields, drop_field
from pipelines.inspect.cache import check, collect_garbage
from pipelines.settings import CaptureSettings
from teacher_cache.errors import KdcliError
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.reading.cached_samples import CachedSamples
from teacher_cache.shards.commit import read_commit
from teacher_cache.shards.storage import Storage
from teacher_cache.sources import DataSpec
from teacher_cache.sources.usable_samples import row_key
from teacher_cache.teachers.transformers import TeacherSpec

pytestmark = pytest.mark.usefixtures("one_thread")

TOPK = {"k": 8, "step": 2.0**-12}


def tree(folder: Path) -> dict[str, bytes]:
    """Every file that belongs to the cache; what lies in ``.staging`` does not."""
    files = (f for f in sorted(folder.rglob("*")) if f.is_file() and ".staging" not in f.parts)
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


@pytest.fixture
def add(tiny_teacher: Path) -> Callable[..., dict[str, Any]]:
    """``add(cache, field={parameters}, …)`` by the tiny teacher, with ``teacher``, ``dtype``, ``other_teacher`` and settings."""

    def run(
        folder: Path, teacher: Path | None = None, dtype: str = "auto", other_teacher: bool = False, **given: Any
    ) -> dict[str, Any]:
        params = {name: value for name, value in given.items() if isinstance(value, dict)}
        settings = {name: value for name, value in given.items() if name not in params}
        capture_settings = replace(CaptureSettings(), **{"workers": 1, "batch_tokens": 1024, **settings})
        spec = TeacherSpec(str(teacher or tiny_teacher), dtype=dtype, device="cpu")
        return add_fields(str(folder), spec, params, capture_settings, other_teacher)

    return run


@pytest.fixture(scope="module")
def moved_away(world_json, make_request, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a cache of one field, the same with three) of a mixture with defects and cut rows that is gone by now."""
    folder = tmp_path_factory.mktemp("moved")
    world = Path(shutil.copytree(world_json.folder, folder / "world"))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    spec = DataSpec("sft", str(world / "train.json"), image_root=str(world / "images"))
    small = {"data": [spec], "shards": 3, "max_length": 85, "over_length": "cut", "allow_skips": 0.5}
    capture(make_request(folder / "one", fields=("response_topk",), **small))
    capture(make_request(folder / "three", fields=("response_topk", "vision_hidden", "relation"), **small))
    torch.set_num_threads(before)
    shutil.rmtree(world)
    return folder / "one", folder / "three"


def test_added_fields_are_those_of_a_whole_capture_though_the_mixture_is_gone(moved_away, copy_of, add) -> None:
    """Same bytes, skips and keys (rows that were cut too), read from ``samples`` alone; nothing that was there changes."""
    one, three = moved_away
    folder = copy_of(one)
    before = tree(folder)
    summary = add(folder, vision_hidden={"codec": "fp32"}, relation={})
    after = tree(folder)
    assert {name: after[name] for name in before} == before
    assert all(
        name.startswith(("fields/vision_hidden/", "fields/relation/", "teacher/")) for name in after.keys() - before
    )
    assert after == tree(three)
    assert check(TeacherCache(str(folder))) == []
    columns = summary["columns"]
    assert columns["samples"]["skipped"] and columns["samples"]["rows"] == 24
    of_samples = columns["samples"] | {"counts": ANY, "bytes": ANY}  # cuts are counted in samples alone
    assert all(one == of_samples for one in columns.values())
    storage = Storage(str(folder))
    for shard in range(3):
        skipped = [read_commit(storage, column, shard).skipped for column in ("samples", "fields/relation")]
        assert skipped[0] == skipped[1]
    keys_of_rest = [row_key(row.sample) == row.key for row in read_all(folder, ["relation"])]
    assert len(keys_of_rest) == columns["samples"]["written"]
    assert any(keys_of_rest) and not all(keys_of_rest), (
        "some rows were cut: what is left of them has another hash than their key"
    )


def test_a_calibrated_field_is_fitted_on_the_stored_rows(make_request, mixture, tmp_path: Path, add) -> None:
    """The same calibration and the same bytes as in a capture of all the fields, and read back from there."""
    small = {"data": mixture[1:], "shards": 2, "codec": "sketch"}
    capture(make_request(tmp_path / "grown", fields=("response_topk",), **small))
    capture(make_request(tmp_path / "whole", fields=("response_topk", "vision_hidden", "affinity"), **small))
    add(tmp_path / "grown", vision_hidden={"codec": "sketch"}, affinity={})
    assert any("calibration" in name for name in tree(tmp_path / "grown"))
    assert tree(tmp_path / "grown") == tree(tmp_path / "whole")
    add(tmp_path / "grown", vision_hidden={"codec": "sketch"})
    assert len(read_all(tmp_path / "grown", ["vision_hidden"])) == 21
    assert collect_garbage(TeacherCache(str(tmp_path / "grown")), remove=False) == []
    drop_field(str(tmp_path / "grown"), "vision_hidden", remove=True)
    garbage = collect_garbage(TeacherCache(str(tmp_path / "grown")), remove=True)
    assert garbage and all("/calibration/vision_hidden-" in name for name in garbage)
    assert check(TeacherCache(str(tmp_path / "grown"))) == []


def read_all(folder: Path, fields: list[str]) -> list[Any]:
    cache = TeacherCache(str(folder))
    rows = CachedSamples(cache, cache.parts(), fields)
    return [rows.read(position, row) for position, count in enumerate(rows.counts) for row in range(count)]


@pytest.mark.exhaustive  # two workers; test_cache_teacher.py has two of a whole capture
@pytest.mark.usefixtures("forked_workers")
def test_adding_again_is_nothing_and_two_workers_write_the_same(moved_away, copy_of, add) -> None:
    one, three = moved_away
    folder = copy_of(one)
    add(folder, vision_hidden={"codec": "fp32"}, relation={}, workers=2)
    assert tree(folder) == tree(three)
    times = {name: (folder / name).stat().st_mtime_ns for name in tree(folder)}
    add(folder, vision_hidden={"codec": "fp32"}, relation={})
    assert {name: (folder / name).stat().st_mtime_ns for name in tree(folder)} == times


def test_kills_between_any_two_writes_of_an_added_field(moved_away, copy_of, add, make_mortal) -> None:
    one, three = moved_away
    folder = copy_of(one)
    before = tree(folder)

    def still_reads() -> None:
        assert {name: data for name, data in tree(folder).items() if name in before} == before
        assert len(read_all(folder, ["response_topk"])) > 0

    mortal = make_mortal("put_file", "put_new")
    job = lambda: add(folder, vision_hidden={"codec": "fp32"}, relation={})  # noqa: E731
    assert mortal.until_done(job, 7, still_reads) >= 2
    mortal.budget = -1
    collect_garbage(TeacherCache(str(folder)), remove=True)
    assert tree(folder) == tree(three)


@pytest.mark.exhaustive  # every moment of a removal; the writes of an added field stay
def test_kills_between_any_two_removals(tiny_cache: Path, copy_of, make_mortal) -> None:
    """Whenever it dies, the cache opens, the other fields read, no commit names what is gone, and the end is as if never killed."""
    whole = tree(tiny_cache)
    folder = copy_of(tiny_cache)

    def still_reads() -> None:
        assert len(read_all(folder, ["vision_topk"])) == 31
        assert all("not captured yet" in problem.what for problem in check(TeacherCache(str(folder))))

    mortal = make_mortal("remove")
    job = lambda: drop_field(str(folder), "vision_hidden", remove=True)  # noqa: E731
    assert mortal.until_done(job, 1, still_reads) == 15
    assert tree(folder) == {name: data for name, data in whole.items() if not name.startswith("fields/vision_hidden/")}
    assert not (folder / "fields" / "vision_hidden").exists()
    assert check(TeacherCache(str(folder))) == []


def test_a_killed_removal_ends_as_no_field_or_as_a_field_again(tiny_cache: Path, copy_of, add, make_mortal) -> None:
    folder = copy_of(tiny_cache)
    mortal = make_mortal("remove")
    mortal.budget = 3
    with pytest.raises(mortal.Killed):
        drop_field(str(folder), "vision_topk", remove=True)
    mortal.budget = -1  # whoever comes next lives
    add(folder, vision_topk=TOPK)  # two minds: the half-removed field is captured again
    assert check(TeacherCache(str(folder))) == []
    assert len(read_all(folder, ["vision_topk"])) == 31
    (folder / "fields" / "empty").mkdir()  # a capture that died at its first write
    assert "empty" not in TeacherCache(str(folder)).fields


def test_drop_says_what_would_go_and_leaves_what_others_use(tiny_cache: Path, copy_of) -> None:
    folder = copy_of(tiny_cache)
    before = tree(folder)
    found = drop_field(str(folder), "vision_hidden", remove=False)
    assert tree(folder) == before
    own = {name: data for name, data in before.items() if name.startswith("fields/vision_hidden/")}
    assert (found.shards, found.files, found.bytes) == (5, len(own), sum(map(len, own.values())))
    for name in sorted(TeacherCache(str(folder)).fields):
        drop_field(str(folder), name, remove=True)
        cache = TeacherCache(str(folder))
        garbage = [file.split("/")[2] for file in collect_garbage(cache, remove=False) if file.startswith("teacher/")]
        with_head = any(name.endswith("_hidden") for name in cache.fields)
        assert ("head.safetensors" in garbage) == (not with_head), "a head is garbage when its last field is gone"
        assert ("processor" in garbage) == (not cache.fields), "and all of its teacher's files when the very last is"
    collect_garbage(TeacherCache(str(folder)), remove=True)
    left = tree(folder)
    assert {name.split("/")[0] for name in left} == {"manifest.json", "samples"}
    assert check(TeacherCache(str(folder))) == []


def test_drop_then_add_with_other_parameters(tiny_cache: Path, copy_of, add) -> None:
    folder = copy_of(tiny_cache)
    with pytest.raises(KdcliError, match=r"params.k: cache 8, here 4.*drop-field"):
        add(folder, vision_topk=TOPK | {"k": 4})
    drop_field(str(folder), "vision_topk", remove=True)
    add(folder, vision_topk=TOPK | {"k": 4})
    assert check(TeacherCache(str(folder))) == []
    assert all(row.fields["vision_topk"].ids.shape[1] == 4 for row in read_all(folder, ["vision_topk"]))


def test_a_damaged_description_can_be_dropped(tiny_cache: Path, copy_of) -> None:
    folder = copy_of(tiny_cache)
    (folder / "fields" / "relation" / "field.json").write_text("{")
    with pytest.raises(KdcliError):
        TeacherCache(str(folder))
    drop_field(str(folder), "relation", remove=True)
    assert check(TeacherCache(str(folder))) == []


def test_a_field_of_another_teacher_is_asked_for(tiny_cache: Path, copy_of, add, tiny_student: Path) -> None:
    folder = copy_of(tiny_cache)
    drop_field(str(folder), "response_hidden", remove=True)
    with pytest.raises(KdcliError, match=r"hidden_size: cache 48, here 32.*--other-teacher"):
        add(folder, teacher=tiny_student, response_hidden={"codec": "fp32"})
    with pytest.raises(KdcliError, match=r"dtype: cache float32, here bfloat16.*the original --teacher and --dtype"):
        add(folder, dtype="bfloat16", response_hidden={"codec": "fp32"})
    add(folder, teacher=tiny_student, other_teacher=True, response_hidden={"codec": "fp32"})
    cache = TeacherCache(str(folder))
    assert cache.teacher_head("response_hidden").shape[1] == 32 and cache.teacher_head("vision_hidden").shape[1] == 48
    assert check(cache) == []
    with pytest.raises(KdcliError, match=r"response_hidden exists, made by another teacher.*drop-field"):
        add(folder, response_hidden={"codec": "fp32"})


def test_parts_without_the_field(moved_away, tiny_cache: Path, copy_of, add) -> None:
    folder = copy_of(tiny_cache)
    drop_field(str(folder), "relation", remove=True)
    summary = add(folder, relation={}, parts_without_fields=("caption",))
    assert summary["columns"]["fields/relation"]["rows"] == 21
    assert check(TeacherCache(str(folder))) == []


def test_rows_that_would_become_other_tokens_are_refused(moved_away, copy_of, add, monkeypatch) -> None:
    """The fingerprints agree and yet a library reads the text in another way: no field is written beside other tokens."""
    from teacher_cache.reading import stored_samples

    folder = copy_of(moved_away[0])
    before = tree(folder)
    monkeypatch.setattr(stored_samples, "_same_text", lambda one, other: False)
    with pytest.raises(KdcliError, match=r"row \d{9}-\w{8} \(train.json row \d+\).*library versions of the capture"):
        add(folder, relation={})
    after = tree(folder)
    assert {name: after[name] for name in before} == before
    assert not [name for name in after if name.startswith("fields/relation/") and "field.json" not in name]


def run(*arguments: object) -> Any:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def refused(result: Any, *said: str) -> None:
    assert result.exit_code != 0, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, (result.stderr, result.exception)
    for words in said:
        assert re.search(words, lines[0]), lines[0]


def test_the_commands(tiny_cache: Path, copy_of, tiny_teacher: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = copy_of(tiny_cache)
    listed = run("cache", "drop-field", folder, "vision_topk")
    assert re.search(r"vision_topk: 5 shards, 16 files, .* would be removed \(--yes\)", listed.stdout)
    assert (folder / "fields" / "vision_topk").exists()
    assert json.loads(run("cache", "drop-field", folder, "vision_topk", "--yes", "--json").stdout)["removed"] is True
    assert not (folder / "fields" / "vision_topk").exists()
    assert "removed" in run("cache", "drop-field", folder, "vision_hidden", "--yes").stdout
    fields = [
        "--field",
        "vision_topk",
        "--field",
        "vision_hidden",
        "--set",
        "vision_topk.k=4",
        "--set",
        "vision_hidden.codec=int8",
    ]
    added = run("cache", "add-field", folder, *fields, "--teacher", tiny_teacher, "--device", "cpu", "--json")
    assert added.exit_code == 0, (added.output, added.exception)
    assert json.loads(added.stdout)["columns"]["fields/vision_topk"]["written"] == 31
    cache = TeacherCache(str(folder))
    assert (
        cache.fields["vision_topk"]["params"]["k"] == 4 and cache.fields["vision_hidden"]["params"]["codec"] == "int8"
    )
    assert run("cache", "verify", folder).stdout == "every checksum holds\n"
    (tmp_path / "kd.toml").write_text(
        f'cache = "{folder}"\n[teacher]\nid = "{tiny_teacher}"\ndevice = "cpu"\n[fields.vision_topk]\nk = 4\n'
    )
    again = run("cache", "add-field", "--field", "vision_topk")
    assert again.exit_code == 0 and "fields/vision_topk" in again.stdout


BAD = [
    (["--field", "depth"], ["unknown field 'depth'", "affinity, attention, relation"]),
    (
        ["--field", "vision_topk"],
        ["vision_topk exists with other parameters", "params.k: cache 8, here 64", "drop-field"],
    ),
    (
        ["--field", "vision_topk", "--field", "relation", "--set", "k=8"],
        ["--set k=…: of which field", "vision_topk.k="],
    ),
    (["--field", "relation", "--set", "vision_topk.k=8"], ["vision_topk is not among the fields to add: relation"]),
    (["--field", "relation", "--set", "k"], ["--set k: write NAME=VALUE"]),
    (["--field", "relation", "--set", "k=8"], ["relation", "unknown parameters"]),
    (["--field", "affinity", "--workers", "-1"], ["--workers must not be negative"]),
    (["--field", "affinity", "--batch-tokens", "0"], ["--batch-tokens must be at least 1"]),
    (["--field", "affinity", "--calibration-rows", "0"], ["--calibration-rows must be at least 1"]),
    (["--field", "affinity", "--device", "gpu"], ["device 'gpu'"]),
    (["--field", "affinity", "--dtype", "int4"], ["dtype 'int4'"]),
    (["--field", "affinity", "--teacher", "nowhere/model"], ["'nowhere/model' cannot be loaded"]),
    (["--field", "affinity", "--parts-without-fields", "sfts"], ["sfts", "the parts are caption, sft"]),
]


@pytest.mark.parametrize(("flags", "said"), BAD)
def test_bad_flags_change_nothing(tiny_cache: Path, tiny_teacher: Path, tmp_path, monkeypatch, flags, said) -> None:
    monkeypatch.chdir(tmp_path)
    before = tree(tiny_cache)
    teacher = [] if "--teacher" in flags else ["--teacher", tiny_teacher]
    refused(run("cache", "add-field", tiny_cache, *flags, *teacher), *said)
    assert tree(tiny_cache) == before


def test_other_refusals(tiny_cache: Path, copy_of, tiny_teacher: Path, world, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused(run("cache", "add-field", "--field", "relation"), "no cache", "kdcli init")
    refused(run("cache", "add-field", tiny_cache, "--field", "relation"), "no --teacher", "kdcli init")
    refused(run("cache", "add-field", world.folder, "--field", "relation", "--teacher", tiny_teacher), "no cache here")
    refused(run("cache", "drop-field", world.folder, "relation"), "no cache here")
    refused(
        run("cache", "drop-field", tiny_cache, "depth"), "no field depth; it has affinity, relation, response_hidden"
    )
    refused(run("cache", "drop-field", tiny_cache, ".."), "no field ..; it has")
    folder = copy_of(tiny_cache)
    (folder / "samples" / "commits" / "000003.json").unlink()
    refused(
        run("cache", "add-field", folder, "--field", "relation", "--teacher", tiny_teacher),
        "samples has 4 of 5 shards",
        "kdcli cache-teacher",
    )
    other = Path(shutil.copytree(tiny_teacher, tmp_path / "other"))
    template = other / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|end|>", "<|end|>\\n"))
    refused(
        run("cache", "add-field", tiny_cache, "--field", "relation", "--teacher", other, "--other-teacher"),
        r"prepares rows differently from this cache: preparation\.chat_template: cache",
        "--teacher",
    )
