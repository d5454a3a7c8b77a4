"""Calibration as a committed step: before the workers, once, whoever writes it and whatever kills them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.capture.cache_teacher import capture
from pipelines.capture.describe import describe, field_path
from pipelines.inspect.cache import check, collect_garbage
from teacher_cache.errors import CacheError
from teacher_cache.fields import create_field
from teacher_cache.planning.make_plan import make_plan
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.records import TeacherOutput
from teacher_cache.shards.sealed import unseal
from teacher_cache.shards.storage import Storage
from tests.exhaustive import of_all

CALIBRATED = ("response_topk", "vision_topk", "response_hidden", "vision_hidden", "affinity")


def tree(folder: Path) -> dict[str, bytes]:
    """Every file that belongs to the cache; what lies in ``.staging`` does not."""
    files = (f for f in sorted(folder.rglob("*")) if f.is_file() and ".staging" not in f.parts)
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


def test_another_number_of_calibration_rows_changes_nothing_that_is_there(
    standard: Path, copy_of, make_request
) -> None:
    """The cache's calibration is fitted once; a run that would fit another one reads it."""
    folder = copy_of(standard)
    before = tree(folder)
    capture(make_request(folder, fields=(), store="standard", calibration_rows=9))
    assert tree(folder) == before


class Killed(BaseException):
    """The process dies: nothing catches it."""


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("writes", of_all([2, 11, 14, 17, 21], 2, 14, 21))
def test_killed_at_any_write_and_run_again(
    standard: Path, make_request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    """Before, between and behind calibration files: the end is the same bytes. Between them one moment stands for three."""
    real: dict[str, Callable[..., Any]] = {name: getattr(Storage, name) for name in ("put_file", "put_new")}
    left = writes

    def dying(name: str) -> Callable[..., Any]:
        def write(self, *arguments: Any) -> Any:
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            return real[name](self, *arguments)

        return write

    out = tmp_path / "c"
    with monkeypatch.context() as patched:
        for name in real:
            patched.setattr(Storage, name, dying(name))
        with pytest.raises(Killed):
            capture(make_request(out, fields=(), store="standard"))
    capture(make_request(out, fields=(), store="standard"))
    assert check(TeacherCache(str(out))) == []
    collect_garbage(TeacherCache(str(out)), remove=True)
    assert tree(out) == tree(standard)


def test_calibration_is_committed_before_any_shard(make_request, tmp_path: Path, monkeypatch) -> None:
    def die(*arguments: Any) -> None:
        raise Killed

    monkeypatch.setattr("pipelines.capture.cache_teacher.run_shards", die)
    out = tmp_path / "c"
    with pytest.raises(Killed):
        capture(make_request(out, fields=(), store="standard"))
    assert not list(out.rglob("commits/*"))
    cache = TeacherCache(str(out))
    assert set(cache.fields) == set(CALIBRATED)
    assert all(cache.open_field(name).calibrated for name in CALIBRATED)
    assert all(cache.low_rank_head(name) for name in ("response_hidden", "vision_hidden"))


@pytest.mark.parametrize("moment", ["while it fits", "just before it commits"])
def test_of_two_writers_the_first_ones_calibration_counts(
    tmp_path: Path, mixture, preparer, teacher_parts, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Both fit, on other rows; the slower one encodes with what the faster one committed."""
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(50, 4, generator=generator)
    storage, plan = Storage(str(tmp_path)), make_plan(mixture, 2, preparer.fingerprint(), 0, image_tokens=36)
    fields = {"vision_hidden": create_field("vision_hidden", {"codec": "sketch"})}
    faster: list[Any] = []

    def run(seed: int, meanwhile: Callable[[], None] = lambda: None) -> Any:
        def fit(new: Any) -> Any:
            meanwhile()
            rows = torch.randn(90, 4, generator=torch.Generator().manual_seed(seed)) * (seed + 1)
            return {name: one.fit([TeacherOutput({"vision": rows})], head) for name, one in new.items()}

        return describe(storage, plan, fields, {"weights": "w"}, teacher_parts[0], lambda: head, fit)

    put_new = Storage.put_new

    def late(self: Storage, relative: str, data: bytes) -> bool:
        if relative.endswith("field.json") and not faster:
            monkeypatch.setattr(Storage, "put_new", put_new)
            faster.append(run(5))
        return put_new(self, relative, data)

    if moment == "while it fits":
        hashes, bound = run(1, lambda: faster.append(run(5)))
    else:
        monkeypatch.setattr(Storage, "put_new", late)
        hashes, bound = run(1)
    assert hashes == faster[0][0]
    said = TeacherOutput({"vision": torch.randn(7, 4, generator=generator)})
    one, two = bound["vision_hidden"], faster[0][1]["vision_hidden"]
    assert torch.equal(one.encode(None, said)["coded"], two.encode(None, said)["coded"])
    body = unseal(storage.read(field_path("vision_hidden")), "")
    named = {Path(body[role]["path"]).name for role in ("calibration", "low_rank_head")}
    there = {path.name for path in tmp_path.glob("teacher/*/calibration/*")}
    assert named <= there and len(there - named) == (0 if moment == "while it fits" else 2)


def test_another_step_in_the_same_cache_is_refused(standard: Path, copy_of, make_request) -> None:
    folder = copy_of(standard)
    before = tree(folder)
    request = make_request(folder, fields=(), store="standard")
    other = replace(request, field_params={"vision_hidden": {"step": 0.5}})
    with pytest.raises(
        CacheError, match=r"field vision_hidden was made with other settings: params.step: cache .* here 0.5"
    ):
        capture(other)
    assert tree(folder) == before


def test_files_are_named_by_their_content(standard: Path) -> None:
    for file in standard.glob("teacher/*/calibration/*"):
        assert hashlib.sha256(file.read_bytes()).hexdigest()[:12] in file.name
