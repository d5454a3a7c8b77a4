"""Subsets and merges: complete caches of the same records, whatever was chosen, killed and run again, and refused with one line."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from cli import main
from pipelines.capture.cache_teacher import capture
from pipelines.edit.choose_samples import RowFilter
from pipelines.edit.derive import merge, subset
from pipelines.edit.fields import add_fields, drop_field
from pipelines.inspect.cache import check, collect_garbage, status
from pipelines.settings import CaptureSettings, Settings
from pipelines.train.train_student import train
from student_train.config import TrainSettings
from teacher_cache.capturing import behind
from teacher_cache.errors import KdcliError
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.reading.cached_samples import CachedSample, CachedSamples
from teacher_cache.shards.commit import read_commit
from teacher_cache.shards.storage import Storage
from teacher_cache.sources import DataSpec
from teacher_cache.teachers.transformers import TeacherSpec
from tests.close import equal_tensors

FIELDS = ["affinity", "relation", "response_hidden", "response_topk", "vision_hidden", "vision_topk"]


def tree(folder: Path) -> dict[str, bytes]:
    files = (f for f in sorted(folder.rglob("*")) if f.is_file() and ".staging" not in f.parts)
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


def tars(folder: Path, column: str) -> set[bytes]:
    return {file.read_bytes() for file in (folder / column / "data").iterdir()}


def records(folder: Path, fields: list[str] | None = None) -> dict[tuple[str, str], CachedSample]:
    """(part, key) → decoded row, every one exactly once."""
    cache = TeacherCache(str(folder))
    rows = CachedSamples(cache, cache.parts(), FIELDS if fields is None else fields)
    read = [rows.read(position, row) for position, count in enumerate(rows.counts) for row in range(count)]
    found = {(row.sample.part, row.key): row for row in read}
    assert len(found) == len(read)
    return found


def leaves(value: Any) -> list[Any]:
    if isinstance(value, torch.Tensor) or not hasattr(value, "__dict__"):
        return [value]
    return [leaf for inner in vars(value).values() for leaf in leaves(inner)]


def same(ours: CachedSample, theirs: CachedSample) -> bool:
    """Equal samples, tokens, layouts and decoded fields (those that ``ours`` has)."""
    pairs = list(zip(leaves(ours.text), leaves(theirs.text)))
    pairs += [pair for name in ours.fields for pair in zip(leaves(ours.fields[name]), leaves(theirs.fields[name]))]
    equal = all(equal_tensors(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)
    return equal and (ours.key, ours.sample, ours.layout) == (theirs.key, theirs.sample, theirs.layout)


@pytest.fixture(scope="module")
def original(tiny_cache: Path) -> dict[tuple[str, str], CachedSample]:
    return records(tiny_cache)


@pytest.fixture(scope="module")
def with_skips(world_json, make_request, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 rows in 3 shards, some of them skip records."""
    out = tmp_path_factory.mktemp("skips") / "cache"
    spec = DataSpec("sft", world_json.train, image_root=str(world_json.images))
    capture(make_request(out, data=[spec], shards=3, fields=("response_topk", "vision_hidden")))
    return out


def complete(folder: Path) -> dict[str, Any]:
    """The status of a cache in which rows = written + skipped everywhere and every checksum holds."""
    cache = TeacherCache(str(folder))
    assert check(cache) == []
    assert collect_garbage(cache, remove=False) == []
    summary = status(cache)
    for column in summary["columns"].values():
        assert column["rows"] == column["written"] + sum(column["skipped"].values())
        assert column["done"] in (column["shards"], len(cache.shards(["sft"])))
    return summary


SUBSETS = {
    "whole": {},
    "a part": {"parts": ("sft",)},
    "two parts, one field": {"parts": ("sft", "caption"), "fields": ("vision_hidden",)},
    "samples alone": {"fields": ()},
    "no hidden states": {"fields": ("vision_topk", "relation")},
    "with images": {"rows": RowFilter(images=True)},
    "text only": {"rows": RowFilter(images=False)},
    "a third": {"rows": RowFilter(fraction=0.35, seed=3)},
    "seven": {"parts": ("sft",), "rows": RowFilter(max_rows=7)},
}


@pytest.mark.parametrize("name", SUBSETS)
def test_a_subset_holds_the_same_records(tiny_cache: Path, original, tmp_path: Path, name: str) -> None:
    asked, out = SUBSETS[name], tmp_path / "subset"
    subset(str(tiny_cache), str(out), **asked)
    summary = complete(out)
    fields = list(asked.get("fields", FIELDS))
    rows = asked.get("rows", RowFilter())
    wanted = {
        place
        for place, row in original.items()
        if place[0] in asked.get("parts", ("caption", "sft"))
        and (rows.images is None or rows.images == bool(row.layout))
    }
    found = records(out, fields)
    assert set(TeacherCache(str(out)).fields) == set(fields)
    assert all(same(row, original[place]) for place, row in found.items())
    assert found.keys() <= wanted and summary["rows"] == len(found) > 0
    if rows.fraction is None:
        assert len(found) == min(len(wanted), rows.max_rows or len(wanted))
    derived = TeacherCache(str(out)).plan.derived
    assert derived["by"] == "subset" and derived["from"] == [TeacherCache(str(tiny_cache)).plan_hash]
    assert TeacherCache(str(out)).plan_hash != TeacherCache(str(tiny_cache)).plan_hash


def test_whole_shards_are_the_same_tars(tiny_cache: Path, tmp_path: Path) -> None:
    subset(str(tiny_cache), str(tmp_path / "all"))
    subset(str(tiny_cache), str(tmp_path / "part"), parts=("caption",))
    for column in ("samples", *(f"fields/{name}" for name in FIELDS)):
        assert tars(tmp_path / "all", column) == tars(tiny_cache, column)
        assert tars(tmp_path / "part", column) < tars(tiny_cache, column)


def test_a_draw_depends_on_seed_and_keys_alone(tiny_cache: Path, make_request, tmp_path: Path) -> None:
    """The same rows out of another number of shards, nested as the share grows, others with another seed."""
    capture(make_request(tmp_path / "three", shards=3, fields=(), store="none"))
    drawn: dict[Any, set[tuple[str, str]]] = {}
    for number, (url, share, seed) in enumerate(
        [(tiny_cache, 0.3, 0), (tmp_path / "three", 0.3, 0), (tiny_cache, 0.6, 0), (tiny_cache, 0.3, 1)]
    ):
        subset(str(url), str(tmp_path / str(number)), fields=(), rows=RowFilter(fraction=share, seed=seed))
        drawn[number] = set(records(tmp_path / str(number), []))
    assert drawn[0] == drawn[1] < drawn[2]
    assert drawn[3] != drawn[0]
    for number, rows in ((5, 5), (9, 9)):
        subset(str(tiny_cache), str(tmp_path / f"max{number}"), fields=(), rows=RowFilter(max_rows=rows))
    assert set(records(tmp_path / "max5", [])) < set(records(tmp_path / "max9", []))


def test_keys_from_a_file(tiny_cache: Path, original, tmp_path: Path) -> None:
    keys = tmp_path / "keys.txt"
    wanted = sorted(key for _, key in original)[::4]
    keys.write_text("\n".join(wanted) + "\n")
    assert run("cache", "subset", tiny_cache, "--keys", keys, "--out", tmp_path / "out").exit_code == 0
    complete(tmp_path / "out")
    assert {key for _, key in records(tmp_path / "out")} == set(wanted)


def test_skip_records_stay_where_every_row_does(with_skips: Path, tmp_path: Path) -> None:
    whole = complete(with_skips)["columns"]
    assert sum(whole["samples"]["skipped"].values()) > 0
    subset(str(with_skips), str(tmp_path / "all"), parts=("sft",))
    assert complete(tmp_path / "all")["columns"] == whole
    storages = Storage(str(with_skips)), Storage(str(tmp_path / "all"))
    for column in whole:
        for shard in range(3):
            before, after = (read_commit(storage, column, shard).skipped for storage in storages)
            assert before == after
    subset(str(with_skips), str(tmp_path / "some"), rows=RowFilter(fraction=1.0))
    columns = complete(tmp_path / "some")["columns"]
    assert all(column["skipped"] == {} and column["rows"] == whole["samples"]["written"] for column in columns.values())


def test_rows_that_only_a_field_skips(make_request, tmp_path: Path, monkeypatch) -> None:
    """The teacher says NaN of every third row: subsets keep the field's own skip records of their rows, and all counts hold."""
    real, asked = behind.is_finite, []
    monkeypatch.setattr(behind, "is_finite", lambda output: bool(len(asked.append(0) or asked) % 3) and real(output))
    capture(make_request(tmp_path / "nan", fields=("response_hidden",)))
    whole = complete(tmp_path / "nan")["columns"]["fields/response_hidden"]
    assert whole["skipped"] == {"nonfinite_teacher": 10}
    for name, images in (("images", True), ("text", False)):
        subset(str(tmp_path / "nan"), str(tmp_path / name), rows=RowFilter(images=images))
    parts = [complete(tmp_path / name)["columns"]["fields/response_hidden"] for name in ("images", "text")]
    assert sum(one["skipped"].get("nonfinite_teacher", 0) for one in parts) == 10
    merge([str(tmp_path / "images"), str(tmp_path / "text")], str(tmp_path / "both"))
    after = complete(tmp_path / "both")["columns"]["fields/response_hidden"]
    assert (after["rows"], after["skipped"], after["counts"]) == (31, whole["skipped"], whole["counts"])
    assert (
        records(tmp_path / "both", ["response_hidden"]).keys() == records(tmp_path / "nan", ["response_hidden"]).keys()
    )


@pytest.mark.usefixtures("forked_workers")
def test_complementary_subsets_merge_to_every_record(tiny_cache: Path, original, tmp_path: Path) -> None:
    for name, images in (("images", True), ("text", False)):
        subset(str(tiny_cache), str(tmp_path / name), rows=RowFilter(images=images))
    merge([str(tmp_path / "images"), str(tmp_path / "text")], str(tmp_path / "both"))
    summary = complete(tmp_path / "both")
    assert summary["rows"] == 31
    found = records(tmp_path / "both")
    assert found.keys() == original.keys()
    assert all(same(row, original[place]) for place, row in found.items())
    files = {p.spec.part: p.fingerprint for p in TeacherCache(str(tmp_path / "both")).plan.parts}
    assert files == {p.spec.part: dict(p.fingerprint) for p in TeacherCache(str(tiny_cache)).plan.parts}
    for name in ("caption", "sft"):
        subset(str(tiny_cache), str(tmp_path / name), parts=(name,))
    merge([str(tmp_path / "caption"), str(tmp_path / "sft")], str(tmp_path / "parts"), workers=2)
    complete(tmp_path / "parts")
    for column in ("samples", *(f"fields/{name}" for name in FIELDS)):
        assert tars(tmp_path / "parts", column) == tars(tiny_cache, column)


def test_two_mixtures_of_one_part_name(make_request, mixture, world_json, tmp_path: Path) -> None:
    """Ordinals of two files meet in one part; keys tell the rows apart, and every row and skip record is there."""
    other = DataSpec("sft", world_json.train, image_root=str(world_json.images), template="chat")
    for name, data in (("a", [mixture[1]]), ("b", [other])):
        capture(make_request(tmp_path / name, data=data, shards=2, fields=("response_hidden",)))
    merge([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "both"))
    summary = complete(tmp_path / "both")
    halves = [records(tmp_path / name, ["response_hidden"]) for name in "ab"]
    found = records(tmp_path / "both", ["response_hidden"])
    assert found.keys() == halves[0].keys() | halves[1].keys()
    assert all(same(row, next(half[place] for half in halves if place in half)) for place, row in found.items())
    skipped = sum(complete(tmp_path / "b")["columns"]["samples"]["skipped"].values())
    assert summary["rows"] == 45 == len(found) + skipped
    (part,) = TeacherCache(str(tmp_path / "both")).plan.parts
    assert part.rows == 45 and len(part.fingerprint["files"]) == len(part.spec.path.split(", ")) + 1


def test_rows_that_both_hold(tiny_cache: Path, with_skips: Path, original, tmp_path: Path) -> None:
    subset(str(tiny_cache), str(tmp_path / "some"), rows=RowFilter(max_rows=12))
    pair, out = [str(tmp_path / "some"), str(tiny_cache)], tmp_path / "out"
    with pytest.raises(KdcliError, match=r"some and .*fp32 both hold 12 rows \(\w+ \d{9}-\w{8}, .*, …\).*--keep first"):
        merge(pair, str(out))
    assert not out.exists()
    merge(pair, str(out), keep="first")
    assert complete(out)["rows"] == 31
    assert all(same(row, original[place]) for place, row in records(out).items())
    merge([str(with_skips)] * 2, str(tmp_path / "twice"), keep="first")
    assert complete(tmp_path / "twice")["columns"] == complete(with_skips)["columns"]


def test_a_subset_of_a_merge_grows_a_field(tiny_cache: Path, original, tiny_teacher: Path, tmp_path: Path) -> None:
    """Derived caches are caches: of another, with another field, without one."""
    subset(str(tiny_cache), str(tmp_path / "a"), parts=("caption",))
    subset(str(tiny_cache), str(tmp_path / "b"), parts=("sft",))
    merge([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "ab"))
    subset(str(tmp_path / "ab"), str(tmp_path / "c"), rows=RowFilter(fraction=0.5), fields=("relation",))
    spec = TeacherSpec(str(tiny_teacher), device="cpu")
    add_fields(str(tmp_path / "c"), spec, {"vision_hidden": {"codec": "fp32"}}, CaptureSettings())
    complete(tmp_path / "c")
    for place, row in records(tmp_path / "c", ["vision_hidden"]).items():
        assert row.sample == original[place].sample
        torch.testing.assert_close(
            row.fields["vision_hidden"], original[place].fields["vision_hidden"], atol=1e-4, rtol=1e-4
        )
    drop_field(str(tmp_path / "c"), "relation", remove=True)
    complete(tmp_path / "c")


def test_calibrations_travel_and_must_agree(make_request, mixture, tmp_path: Path) -> None:
    """A sketch is read with what it was fitted on: subsets take it along and merge again; one that was fitted apart is another field."""
    fields = ("vision_hidden", "response_hidden")
    for name, rows in (("one", 256), ("other", 15)):
        request = make_request(
            tmp_path / name, data=mixture[1:], shards=2, fields=fields, codec="sketch", calibration_rows=rows
        )
        capture(request)
    for name, images in (("images", True), ("text", False)):
        subset(str(tmp_path / "one"), str(tmp_path / name), rows=RowFilter(images=images))
    merge([str(tmp_path / "images"), str(tmp_path / "text")], str(tmp_path / "both"))
    complete(tmp_path / "both")
    before, after = (records(tmp_path / name, list(fields)) for name in ("one", "both"))
    assert before.keys() == after.keys() and all(same(row, before[place]) for place, row in after.items())
    with pytest.raises(KdcliError, match=r"response_hidden is not the same: calibration\.\w+: first .*--fields"):
        merge([str(tmp_path / "one"), str(tmp_path / "other")], str(tmp_path / "out"), keep="first")
    other = make_request(tmp_path / "other", fields=fields, codec="sketch", calibration=str(tmp_path / "one"))
    for name in fields:
        drop_field(str(tmp_path / "other"), name, remove=True)
    add_fields(str(tmp_path / "other"), other.teacher, other.field_params, other.settings)
    merge([str(tmp_path / "one"), str(tmp_path / "other")], str(tmp_path / "out"), keep="first")
    complete(tmp_path / "out")


def test_parts_without_a_field(make_request, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    capture(make_request(bare, fields=("response_hidden",), parts_without_fields=("caption",)))
    subset(str(bare), str(tmp_path / "half"), rows=RowFilter(fraction=0.5))
    complete(tmp_path / "half")
    full = tmp_path / "full"
    capture(make_request(full, fields=("response_hidden",)))
    subset(
        str(bare), str(tmp_path / "few"), parts=("caption",), rows=RowFilter(max_rows=4), fields=("response_hidden",)
    )
    with pytest.raises(KdcliError, match=r"response_hidden has only some shards of part caption over these caches"):
        merge([str(tmp_path / "few"), str(full)], str(tmp_path / "out"), keep="first")


@pytest.mark.parametrize("how", ["subset", "merge"])
def test_kills_between_any_two_writes(tiny_cache: Path, tmp_path: Path, make_mortal, how: str) -> None:
    for name in ("caption", "sft"):
        subset(str(tiny_cache), str(tmp_path / name), parts=(name,), fields=("vision_topk", "response_hidden"))

    def job(out: Path) -> None:
        if how == "merge":
            merge([str(tmp_path / "sft"), str(tmp_path / "caption")], str(out))
        else:
            subset(str(tmp_path / "sft"), str(out), rows=RowFilter(fraction=0.7))

    def clean() -> None:
        if (tmp_path / "killed" / "manifest.json").exists():
            assert all("not captured yet" in problem.what for problem in check(TeacherCache(str(tmp_path / "killed"))))

    job(tmp_path / "quiet")
    mortal = make_mortal("put_file", "put_new")
    assert mortal.until_done(lambda: job(tmp_path / "killed"), 7, clean) >= 4
    collect_garbage(TeacherCache(str(tmp_path / "killed")), remove=True)
    assert tree(tmp_path / "killed") == tree(tmp_path / "quiet")
    times = {name: (tmp_path / "killed" / name).stat().st_mtime_ns for name in tree(tmp_path / "killed")}
    job(tmp_path / "killed")
    assert {name: (tmp_path / "killed" / name).stat().st_mtime_ns for name in times} == times


def test_caches_that_are_no_local_folders(tiny_cache: Path, original) -> None:
    """All of it through fsspec: subset, merge, run again, drop."""
    places = [f"memory://kdcli-derive/{name}" for name in ("images", "text", "both")]
    for place, images in zip(places, (True, False)):
        subset(str(tiny_cache), place, rows=RowFilter(images=images))
    for _ in range(2):
        merge(places[:2], places[2])
        cache = TeacherCache(places[2])
        assert check(cache) == [] and collect_garbage(cache, remove=False) == []
        assert sum(CachedSamples(cache, cache.parts(), FIELDS).counts) == len(original)
    drop_field(places[2], "relation", remove=True)
    assert "relation" not in TeacherCache(places[2]).fields and check(TeacherCache(places[2])) == []


def test_damage_is_not_copied(tiny_cache: Path, copy_of, tmp_path: Path) -> None:
    folder = copy_of(tiny_cache)
    tar = sorted((folder / "fields" / "vision_hidden" / "data").iterdir())[-1]
    data = bytearray(tar.read_bytes())
    data[len(data) // 2] ^= 1
    tar.write_bytes(data)
    with pytest.raises(KdcliError, match="shard 000004 of fields/vision_hidden is damaged"):
        subset(str(folder), str(tmp_path / "out"))
    assert all("not captured yet" in problem.what for problem in check(TeacherCache(str(tmp_path / "out"))))


@pytest.fixture
def train_from(tiny_student: Path, tmp_path: Path) -> Callable[[Path, str], dict[str, Any]]:
    def run_training(cache: Path, stages: str) -> dict[str, Any]:
        settings = TrainSettings(
            student=str(tiny_student),
            output_dir=str(tmp_path / f"run-{cache.name}"),
            per_device_train_batch_size=4,
            max_steps=1,
            report_to="none",
        )
        return train(str(cache), "llava-kd", Settings(train=settings), stages)

    return run_training


def test_students_train_from_subset_and_merge(tiny_cache: Path, tmp_path: Path, train_from) -> None:
    subset(str(tiny_cache), str(tmp_path / "few"), parts=("sft",), rows=RowFilter(max_rows=8))
    subset(str(tiny_cache), str(tmp_path / "caption"), parts=("caption",))
    merge([str(tmp_path / "few"), str(tmp_path / "caption")], str(tmp_path / "both"))
    for cache, stages in ((tmp_path / "few", "DFT"), (tmp_path / "both", "DPT,DFT")):
        result = train_from(cache, stages)
        assert [stage["steps"] for stage in result["stages"]] == [1] * len(stages.split(","))


def run(*arguments: object) -> Any:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def refused(result: Any, *said: str) -> None:
    assert result.exit_code != 0, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, (result.stderr, result.exception)
    for words in said:
        assert re.search(words, lines[0]), lines[0]


BAD_SUBSETS = [
    (["--parts", "sfts"], ["no part sfts; it has caption, sft"]),
    (["--fields", "depth"], ["no field depth; it has affinity"]),
    (["--fraction", "0"], ["--fraction must be above 0 and at most 1, got 0"]),
    (["--fraction", "1.5"], ["--fraction must be", "1.5"]),
    (["--max-rows", "0"], ["--max-rows must be at least 1"]),
    (["--parts", "caption", "--text-only"], ["no row of part caption passes the filters"]),
    (["--keys", "no/such/file"], ["--keys no/such/file", "one per line"]),
    (["--keys", "empty"], ["--keys empty: holds no key"]),
    (["--keys", "strange"], ["1 of the --keys are not in samples", "000000000-00000000", "remove them"]),
    (["--workers", "-1"], ["--workers must not be negative"]),
]


@pytest.mark.parametrize(("flags", "said"), BAD_SUBSETS)
def test_bad_subsets_leave_nothing_behind(tiny_cache: Path, tmp_path: Path, monkeypatch, flags, said) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").write_text("\n")
    Path("strange").write_text("000000000-00000000\n")
    refused(run("cache", "subset", tiny_cache, "--out", "out", *flags), *said)
    assert not Path("out").exists()


def test_another_cache_in_the_way(tiny_cache: Path, with_skips: Path, tmp_path: Path) -> None:
    before = tree(with_skips)
    refused(
        run("cache", "subset", tiny_cache, "--parts", "sft", "--out", with_skips), "holds another plan", "another --out"
    )
    refused(run("cache", "subset", tiny_cache, "--out", tiny_cache), "holds another plan", "derived: cache absent")
    assert tree(with_skips) == before
    assert run("cache", "subset", tiny_cache, "--max-rows", "9", "--out", tmp_path / "out").exit_code == 0
    again = ["cache", "subset", tiny_cache, "--max-rows", "8", "--out", tmp_path / "out"]
    refused(run(*again), "holds another plan", "derived.filter.max_rows: cache 9, here 8")


def test_merges_that_cannot_be(tiny_cache: Path, tiny_cache_bf16: Path, make_request, mixture, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused(run("cache", "merge", tiny_cache, "--out", out), "two caches at least")
    refused(
        run("cache", "merge", tiny_cache, tiny_cache_bf16, "--keep", "first", "--out", out),
        r"response_hidden is not the same: params\.codec: first fp32, other bf16",
        "--fields",
    )
    for name, changes in {
        "short": {"max_length": 500},
        "plain": {"data": [mixture[0], replace(mixture[1], template="plain")]},
        "few": {"fields": ("vision_topk",)},
    }.items():
        capture(make_request(tmp_path / name, **{"fields": (), "store": "none", **changes}))
    refused(
        run("cache", "merge", tiny_cache, tmp_path / "short", "--out", out),
        r"different settings.*preparation\.max_length: first 2048, other 500",
    )
    refused(
        run("cache", "merge", tiny_cache, tmp_path / "plain", "--out", out),
        r"parts\.sft\.template: first chat, other plain",
    )
    refused(
        run("cache", "merge", tiny_cache, tmp_path / "few", "--keep", "first", "--out", out),
        "few: no field affinity; it has vision_topk: add it with `kdcli cache add-field .*few --field affinity`",
    )
    refused(run("cache", "merge", tiny_cache, tmp_path, "--out", out), "no cache here")
    refused(run("cache", "merge", tiny_cache, tmp_path / "few", "--out", out), "both hold 31 rows", "--keep first")
    assert not out.exists()
    merged = [
        "cache",
        "merge",
        tiny_cache,
        tmp_path / "few",
        "--keep",
        "first",
        "--fields",
        "vision_topk",
        "--out",
        out,
    ]
    assert run(*merged).exit_code == 0
    complete(out)


def test_incomplete_caches_say_what_to_finish(tiny_cache: Path, copy_of, tmp_path: Path) -> None:
    folder = copy_of(tiny_cache)
    (folder / "fields" / "relation" / "commits" / "000004.json").unlink()
    refused(
        run("cache", "subset", folder, "--out", tmp_path / "out"),
        "field relation has only some shards of part sft",
        "add-field .* --field relation",
    )
    (folder / "samples" / "commits" / "000004.json").unlink()
    refused(run("cache", "subset", folder, "--out", tmp_path / "out"), "1 shards of samples", "kdcli cache-teacher")
    assert not (tmp_path / "out").exists()
    assert run("cache", "subset", folder, "--parts", "caption", "--out", tmp_path / "out").exit_code == 0
    (tmp_path / "out" / "samples" / "commits" / "000000.json").unlink()
    refused(run("cache", "subset", tmp_path / "out", "--out", tmp_path / "next"), "kdcli cache subset")
