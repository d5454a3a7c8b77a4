"""Repair: whatever is damaged becomes byte by byte what it was, nothing else is touched, and nothing unproven is taken."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from cli import main
from pipelines.capture import canaries
from pipelines.capture.cache_teacher import capture
from pipelines.capture.worker import CaptureRequest
from pipelines.edit.derive import subset
from pipelines.edit.repair import RepairRequest, repair
from pipelines.inspect.cache import check, collect_garbage, survey
from teacher_cache.errors import KdcliError
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.reading.cached_samples import CachedSamples
from teacher_cache.shards.sealed import seal, unseal
from teacher_cache.shards.storage import Storage
from teacher_cache.teachers.transformers import TeacherSpec, TransformersTeacher

PARAMS: dict[str, dict[str, Any]] = {
    "response_topk": {"k": 4},
    "vision_topk": {"k": 4},
    "vision_hidden": {"codec": "sketch"},
    "response_hidden": {"codec": "fp32"},
}
"""Coded and not, with a whole head and with a low-rank one: every kind of file that a cache has."""


def tree(folder: Path) -> dict[str, bytes]:
    """Every file that belongs to the cache; what lies in ``.staging`` does not."""
    files = (f for f in sorted(folder.rglob("*")) if f.is_file() and ".staging" not in f.parts)
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Sums split over threads round differently; one thread makes bytes comparable."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def request_of(make_request, mixture) -> Callable[..., CaptureRequest]:
    """``request_of(out)`` → the capture of ``whole``: five rows of each part in four shards."""

    def make(out: Path, **settings: Any) -> CaptureRequest:
        few = [replace(part, limit=5) for part in mixture]
        given = {"data": few, "shards": 4, "fields": tuple(PARAMS), **settings}
        return replace(make_request(out, **given), field_params=PARAMS)

    return make


@pytest.fixture(scope="module")
def whole(request_of, one_thread, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "cache"
    capture(request_of(out))
    return out


@pytest.fixture
def mend(request_of) -> Callable[..., dict[str, Any]]:
    """``mend(cache)`` repairs it with the flags of its capture, or with others."""

    def run(folder: Path, dry_run: bool = False, **given: Any) -> dict[str, Any]:
        made = request_of(folder)
        request = RepairRequest(str(folder), made.teacher, made.data, made.settings, PARAMS)
        return repair(replace(request, **given), dry_run)

    return run


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


DAMAGES = {"flip": flip, "cut": cut, "loss": Path.unlink, "pipe": pipe}
SHARDS = [
    f"{column}/{folder}/*"
    for column in ("samples", "fields/response_topk", "fields/vision_hidden")
    for folder in ("data", "index", "commits")
]
"""Of these, one file of a shard of its own is damaged at a time."""
ALONE = [
    "manifest.json",
    "fields/response_topk/field.json",
    "fields/response_hidden/field.json",
    "fields/vision_hidden/field.json",
    "teacher/*/head.safetensors",
    "teacher/*/head.json",
    "teacher/*/processor.json",
    "teacher/*/processor/tokenizer.json",
    "teacher/*/calibration/vision_hidden-low_rank_head-*",
    "teacher/*/calibration/vision_topk-calibration-*",
]


def untouched(folder: Path, damaged: set[Path]) -> dict[str, tuple[int, int]]:
    """Inode and time of every file but these: replaced by an equal one is touched too."""
    files = [
        file for file in folder.rglob("*") if file.is_file() and file not in damaged and ".staging" not in file.parts
    ]
    return {str(file.relative_to(folder)): (file.stat().st_ino, file.stat().st_mtime_ns) for file in files}


@pytest.mark.parametrize("kind", DAMAGES)
def test_shards_of_every_column_at_once(whole: Path, copy_of, mend, kind: str) -> None:
    """Four shards are damaged in each of three columns, tars, indices and commits in turn; their other files stay as they are."""
    folder = copy_of(whole)
    damaged = {sorted(folder.glob(pattern))[number % 4] for number, pattern in enumerate(SHARDS)}
    for file in damaged:
        DAMAGES[kind](file)
    _, found = survey(str(folder))
    assert len({(one.column, one.shard) for one in found}) >= len({(f.parent.parent, f.name[:6]) for f in damaged})
    places = {(str(file.parent.parent.relative_to(folder)), file.name[:6]) for file in damaged}
    redone = {file for column, shard in places for file in (folder / column).glob(f"*/{shard}*")}
    before = untouched(folder, damaged | redone)
    assert mend(folder)["left"] == []
    assert tree(folder) == tree(whole)
    assert {name: place for name, place in untouched(folder, damaged | redone).items()} == before
    assert not list((folder / ".staging").iterdir())


@pytest.mark.parametrize("kind", DAMAGES)
def test_what_describes_the_cache(whole: Path, copy_of, mend, kind: str) -> None:
    """All of it at once, the manifest too."""
    folder = copy_of(whole)
    damaged = {file for pattern in ALONE for file in folder.glob(pattern)}
    assert len(damaged) == len(ALONE)
    for file in damaged:
        DAMAGES[kind](file)
    before = untouched(folder, damaged)
    result = mend(folder)
    assert result["left"] == [] and "manifest.json" in {one["column"] for one in result["problems"]}
    assert tree(folder) == tree(whole)
    assert untouched(folder, damaged) == before


def test_nothing_damaged_and_a_dry_run(whole: Path, copy_of, mend) -> None:
    folder = copy_of(whole)
    assert mend(folder)["problems"] == []
    flip(next(folder.glob("fields/vision_topk/data/000002*")))
    cut(next(folder.glob("samples/index/000001*")))
    before = tree(folder)
    listed = mend(folder, dry_run=True)["left"]
    assert [(one["column"], one["shard"]) for one in listed] == [("samples", 1), ("fields/vision_topk", 2)]
    assert "mixture" in listed[0]["how"] and "teacher" in listed[1]["how"]
    assert tree(folder) == before


def test_a_kill_between_any_two_writes(whole: Path, copy_of, mend, make_mortal) -> None:
    """Whenever it dies, nothing reads as whole that is not; run again, it ends as if it had not died."""
    folder = copy_of(whole)
    for pattern in [*SHARDS, *ALONE[1:]]:
        flip(sorted(folder.glob(pattern))[0])
    bad = {name for name, data in tree(folder).items() if data != tree(whole)[name]}

    def looks_no_better_than_it_is() -> None:
        now, good = tree(folder), tree(whole)
        assert all(now[name] == good[name] for name in good.keys() - bad)
        now = {name: data for name, data in now.items() if not name.startswith("progress/")}
        assert now.keys() <= good.keys()
        assert bool(survey(str(folder))[1]) == (now != good)

    mortal = make_mortal("put_file", "put_new")
    assert mortal.until_done(lambda: mend(folder), 4, looks_no_better_than_it_is) >= 3
    collect_garbage(TeacherCache(str(folder)), remove=True)
    assert tree(folder) == tree(whole)


def test_other_bytes_are_not_taken_unless_asked(whole: Path, copy_of, mend, request_of, monkeypatch) -> None:
    """A machine whose teacher rounds otherwise: what it makes is refused, and with --replace a new attempt."""
    from teacher_cache.teachers import transformers as module

    real = module.TransformersTeacher.hidden
    monkeypatch.setattr(module.TransformersTeacher, "hidden", lambda self, batch: real(self, batch) * (1 + 2**-12))
    folder = copy_of(whole)
    flip(next(folder.glob("fields/response_hidden/data/000003*")))  # its commit can be read
    cut(next(folder.glob("fields/vision_topk/commits/000001*")))  # here only names say what was there
    flip(next(folder.glob("teacher/*/calibration/vision_hidden-calibration-*")))
    before = tree(folder)
    left = mend(folder)["left"]
    assert tree(folder) == before
    why = {(one["column"], one["shard"]): one["why"] for one in left}
    assert "--replace takes the new ones" in why["fields/response_hidden", 3]
    assert "--replace takes the new ones" in why["fields/vision_topk", 1]
    assert "calibrated here it is another one" in why["fields/vision_hidden", None]
    result = mend(folder, replace=True)
    left = result["left"]
    assert "kdcli cache gc --yes" in result["notes"][0]
    assert [one["column"] for one in left] == ["fields/vision_hidden"], (
        "calibrations bind all shards and are not replaced"
    )
    shutil.copy(
        next(whole.glob("teacher/*/calibration/vision_hidden-calibration-*")),
        next(folder.glob("teacher/*/calibration/")),
    )
    assert check(TeacherCache(str(folder))) == []
    assert {name.split("/")[1] for name in collect_garbage(TeacherCache(str(folder)), remove=True)} == {
        "response_hidden",
        "vision_topk",
    }


def test_a_calibration_from_a_copy(whole: Path, copy_of, mend, request_of, monkeypatch) -> None:
    """Where the fit is another one here, another cache that has the file serves."""
    monkeypatch.setattr("pipelines.capture.adopt_calibration.LEAST_ROWS", 1)
    monkeypatch.setattr("pipelines.edit.restore.fit_fields", None)
    folder = copy_of(whole)
    flip(next(folder.glob("teacher/*/calibration/vision_hidden-low_rank_head-*")))
    settings = replace(request_of(folder).settings, calibration=str(whole))
    assert mend(folder, settings=settings)["left"] == []
    assert tree(folder) == tree(whole)


def test_canaries_come_back_from_their_preflight(whole, copy_of, mend, request_of, teacher_model, preparer) -> None:
    preflight, folder = copy_of(whole), copy_of(whole)
    cache, (teacher_folder,) = TeacherCache(str(preflight)), [f"teacher/{one.name}" for one in whole.glob("teacher/*")]
    teacher = TransformersTeacher.wrap(teacher_model, preparer.processor)
    rows = [preparer.prepare(CachedSamples(cache, ["sft"], []).read(0, 0).sample)]
    canaries.write(cache.storage, teacher_folder, rows, teacher, teacher.head, "float32")
    canaries.copy(cache.storage, Storage(str(folder)), teacher_folder)
    once = tree(folder)
    for file in folder.glob("teacher/*/canaries.*"):
        flip(file)
    (left,) = mend(folder)["left"]
    assert left["column"] == teacher_folder and "name its cache with --calibration" in left["why"]
    settings = replace(request_of(folder).settings, calibration=str(preflight))
    assert mend(folder, settings=settings)["left"] == [] and tree(folder) == once != tree(whole)


def refusals(folder: Path, request: RepairRequest) -> str:
    """Why a repair leaves what it leaves, with the cache as it was."""
    before = tree(folder)
    try:
        said = " ".join(one["why"] for one in repair(request)["left"])
    except KdcliError as error:
        said = str(error)
    assert tree(folder) == before
    return said


def test_what_it_is_not_made_of_is_refused(
    whole: Path, copy_of, request_of, tiny_student: Path, tmp_path: Path
) -> None:
    """Another teacher, another mixture, no mixture, no teacher, other flags: one line each, and nothing changes."""
    folder = copy_of(whole)
    made = request_of(folder)
    request = RepairRequest(str(folder), made.teacher, made.data, made.settings, PARAMS)
    tar = next(folder.glob("fields/response_topk/data/000000*"))
    intact = tar.read_bytes()
    flip(tar)
    assert "give the cache's teacher" in refusals(folder, replace(request, teacher=None))
    student = TeacherSpec(str(tiny_student), dtype="float32", device="cpu")
    assert "made by another teacher than" in refusals(folder, replace(request, teacher=student))
    tar.write_bytes(intact)
    flip(next(folder.glob("samples/data/000000*")))
    fewer = tuple(replace(part, limit=4) for part in made.data)
    assert "parts.caption.rows: cache 5, here 4" in refusals(folder, replace(request, data=fewer))
    gone = tuple(replace(part, path=str(tmp_path / "gone.json")) for part in made.data)
    assert "gone.json" in refusals(folder, replace(request, data=gone))
    flip(folder / "manifest.json")
    assert "its shards are of another plan" in refusals(folder, replace(request, data=fewer))
    assert "give --data" in refusals(folder, replace(request, data=()))


def test_a_lost_description_wants_its_parameters(whole: Path, copy_of, mend) -> None:
    folder = copy_of(whole)
    cut(folder / "fields" / "response_hidden" / "field.json")
    before = tree(folder)
    (left,) = mend(folder, params={**PARAMS, "response_hidden": {"codec": "bf16"}})["left"]
    assert "another description than these flags mean" in left["why"] and tree(folder) == before
    assert mend(folder)["left"] == [] and tree(folder) == tree(whole)


def test_a_mixture_where_the_manifest_says(whole: Path, copy_of, mend) -> None:
    """Without --data the paths of the capture serve."""
    folder = copy_of(whole)
    Path.unlink(next(folder.glob("samples/data/000002*")))
    assert mend(folder, data=())["left"] == [] and tree(folder) == tree(whole)


def test_a_derived_cache(whole: Path, tmp_path: Path, mend) -> None:
    """Whole shards of a subset are those of a capture; its samples come from elsewhere."""
    subset(str(whole), str(tmp_path / "part"), parts=("sft",))
    once = tree(tmp_path / "part")
    flip(next((tmp_path / "part").glob("fields/vision_topk/data/000000*")))
    assert mend(tmp_path / "part")["left"] == [] and tree(tmp_path / "part") == once
    flip(next((tmp_path / "part").glob("samples/data/000000*")))
    (left,) = mend(tmp_path / "part")["left"]
    assert "make it again from them with `kdcli cache subset`" in left["why"]


def test_a_commit_of_another_plan_is_made_again(whole: Path, copy_of, mend) -> None:
    """Readable, sealed, and not of this cache; and commits of two shards exchanged."""
    folder = copy_of(whole)
    file = folder / "fields" / "vision_topk" / "commits" / "000001.json"
    file.write_bytes(seal(unseal(file.read_bytes(), "") | {"plan_hash": "0" * 64}))
    one, two = (folder / "samples" / "commits" / f"00000{n}.json" for n in (2, 3))
    kept = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(kept)
    assert mend(folder)["left"] == [] and tree(folder) == tree(whole)


def test_the_command(whole: Path, copy_of, request_of, tmp_path: Path) -> None:
    """Flags as in the capture; verify names the command, it ends with 0, and says in JSON what was found."""
    folder = copy_of(whole)
    teacher, data = request_of(folder).teacher.id, request_of(folder).data
    flip(next(folder.glob("samples/data/000000*")))
    cut(folder / "fields" / "response_hidden" / "field.json")
    run = CliRunner().invoke(main, ["cache", "verify", str(folder)])
    assert run.exit_code == 1 and "`kdcli cache repair`" in run.output
    assert "samples shard 000000: " in run.output and "fields/response_hidden: " in run.output
    (config := tmp_path / "empty.toml").write_text("")
    flags = [
        "--teacher",
        teacher,
        "--fields",
        "response_hidden",
        "--codec",
        "fp32",
        "--batch-tokens",
        "1024",
        "--device",
        "cpu",
    ]
    for part in data:
        flags += ["--data", part.path, "--part", part.part, "--template", part.template, "--limit", "5"]
        flags += ["--image-root", part.image_root or "."]
    dry = CliRunner().invoke(main, ["cache", "repair", str(folder), "--config", str(config), "--dry-run"])
    assert dry.exit_code == 0 and "2 problems; nothing was changed" in dry.output
    run = CliRunner().invoke(main, ["cache", "repair", str(folder), "--config", str(config), *flags, "--json"])
    assert run.exit_code == 0, run.output
    assert len(json.loads(run.stdout)["problems"]) == 2
    assert tree(folder) == tree(whole)
    run = CliRunner().invoke(main, ["cache", "repair", str(folder), "--config", str(config)])
    assert run.exit_code == 0 and run.output.strip().endswith("every checksum holds: nothing to repair")
