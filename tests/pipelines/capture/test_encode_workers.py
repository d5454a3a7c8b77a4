"""``--encode-workers``: how many there are by default, and that their number decides neither bytes nor errors."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.capture import worker
from pipelines.capture.calibrate import mixture_reader
from pipelines.capture.worker import Captured, encode_workers, waiting
from pipelines.processes import cores
from pipelines.settings import CaptureSettings
from teacher_cache.capturing import cache_shard as line
from teacher_cache.capturing.cache_shard import cache_shard
from teacher_cache.capturing.capture_job import CaptureJob
from teacher_cache.errors import CacheError, KdcliError
from teacher_cache.preparing.prepare import Preparer
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.shards.storage import Storage
from teacher_cache.teachers.transformers import TeacherSpec, TransformersTeacher


@pytest.fixture
def shards(standard: Path, preparer: Preparer, teacher_model: Any, monkeypatch: pytest.MonkeyPatch, one_thread) -> Any:
    """``shards(folder, workers, change)``: the first three of the standard cache, by the real teacher in windows of four rows.

    change: a field → the field in its place.
    """
    monkeypatch.setattr(line, "WINDOW_ROWS", 4)
    cache = TeacherCache(str(standard))
    teacher = TransformersTeacher.wrap(teacher_model, preparer.processor)
    hashes = {name: body["sha256"] for name, body in cache.fields.items()}

    def make(folder: Path, workers: int, change: Callable[[Any], Any] = lambda field: field) -> dict[str, bytes]:
        fields = {name: change(cache.open_field(name)) for name in hashes}
        job = CaptureJob(Storage(folder), cache.plan, hashes, fields, batch_tokens=256, encode_workers=workers)
        for shard in range(3):
            cache_shard(job, shard, job.columns(shard), mixture_reader(cache.plan)(shard), preparer, teacher)
        return files(folder)

    return make


def files(folder: Path) -> dict[str, bytes]:
    return {str(one.relative_to(folder)): one.read_bytes() for one in folder.rglob("*") if one.is_file()}


def test_any_number_of_workers_makes_the_same_bytes(shards: Any, tmp_path: Path) -> None:
    one, two, four = (shards(tmp_path / str(workers), workers) for workers in (1, 2, 4))
    assert one == two == four
    assert len(one) == 3 * 3 * 6, "tar, index and commit of three shards and six columns"


class Refusing:
    """A field that does not take two of the rows, the later of the two at once."""

    def __init__(self, field: Any, rows: set[str]):
        self._field, self._rows = field, rows

    def __getattr__(self, name: str) -> Any:
        return getattr(self._field, name)

    def encode(self, prepared: Any, output: Any) -> Any:
        if prepared.key in self._rows:
            raise CacheError("this row is refused")
        return self._field.encode(prepared, output)


def test_any_number_of_workers_names_the_same_row_and_leaves_nothing(
    shards: Any, standard: Path, tmp_path: Path
) -> None:
    keys = [entry.key for entry in TeacherCache(str(standard)).column("samples").entries(1)]
    said, left = [], []
    for workers in (1, 2, 4):
        folder = tmp_path / str(workers)
        with pytest.raises(CacheError) as error:
            shards(folder, workers, lambda field: Refusing(field, {keys[2], keys[1]}))
        said.append(str(error.value))
        left.append(files(folder))
    assert len(set(said)) == 1 and f"row {keys[1]} cannot be encoded: this row is refused" in said[0]
    assert left[0] == left[1] == left[2]
    assert len(left[0]) == 3 * 6, "shard 0 as it was committed, and no draft of another"


def test_workers_by_default(tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cores that fall to a worker but one; one where the teacher computes on them; what is asked for in any case."""
    settings, null, real = CaptureSettings(), TeacherSpec(f"null:{tiny_teacher}"), TeacherSpec(str(tiny_teacher))
    monkeypatch.setattr(worker, "resolve_device", lambda spec: worker.torch.device("cpu"))
    for count, workers, wanted in ((16, 1, 4), (16, 4, 3), (2, 1, 1), (1, 1, 1), (4, 8, 1)):
        monkeypatch.setattr(worker, "usable_cores", lambda count=count: count)
        assert encode_workers(settings, null, workers) == wanted
        assert encode_workers(settings, real, workers) == 1
    assert encode_workers(replace(settings, encode_workers=9), real, 4) == 9
    ray = replace(settings, executor="ray", cpus_per_worker=3.0)
    assert (encode_workers(ray, null, 1), encode_workers(replace(ray, cpus_per_worker=1.0), null, 1)) == (2, 1)
    with pytest.raises(KdcliError, match="--encode-workers must not be negative, got -1"):
        replace(settings, encode_workers=-1)


@pytest.mark.parametrize(
    ("group", "written", "wanted"),
    [
        ("0::/job/step", {"job/cpu.max": "250000 100000", "job/step/cpu.max": "max 100000"}, 2),
        ("0::/", {"cpu.max": "50000 100000"}, 1),
        ("4:memory:/x\n1:cpu,cpuacct:/x", {"cpu/x/cpu.cfs_quota_us": "300000", "cpu/x/cpu.cfs_period_us": "100000"}, 3),
        ("1:cpu:/x", {"cpu/x/cpu.cfs_quota_us": "-1", "cpu/x/cpu.cfs_period_us": "100000"}, 64),
        ("nonsense", {}, 64),
    ],
)
def test_cores_within_a_quota(group: str, written: dict[str, str], wanted: int, tmp_path: Path, monkeypatch) -> None:
    for name, text in written.items():
        (tmp_path / "sys" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "sys" / name).write_text(text + "\n")
    (tmp_path / "group").write_text(group + "\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert cores.usable_cores(tmp_path / "sys", tmp_path / "group") == wanted


def test_a_teacher_that_waits_is_told_of() -> None:
    """Where it is much, of a time that is worth a word."""
    said = waiting([Captured(0, 50.0, 1.0, 2), Captured(1, 50.0, 19.0, 2)])
    assert said.startswith(
        "the teacher waited 20% of the time for rows to be encoded, by 2 threads a worker: raise --encode-workers"
    )
    assert not waiting([]) and not waiting([Captured(0, 10.0, 9.0, 1)]) and not waiting([Captured(0, 900.0, 40.0, 1)])
