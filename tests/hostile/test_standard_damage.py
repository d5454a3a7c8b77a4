"""Damage to a cache of the standard profile: calibration files and low-rank heads are as guarded as rows are."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.inspect.cache import check, collect_garbage
from teacher_cache.errors import CacheError, KdcliError
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.reading.cached_samples import CachedSamples
from teacher_cache.shards.sealed import seal, unseal

FIELDS = ("affinity", "response_hidden", "response_topk", "vision_hidden", "vision_topk")
FLIPS = 200


@pytest.fixture(scope="module")
def standard_cache(make_request, mixture, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pipelines.capture.cache_teacher import capture

    out = tmp_path_factory.mktemp("standard") / "cache"
    capture(make_request(out, data=mixture, fields=(), store="standard", shards=3))
    return out


def said_of(folder: Path) -> str:
    """Everything that verify says, "" where it finds nothing wrong."""
    try:
        return "\n".join(str(problem) for problem in check(TeacherCache(str(folder))))
    except KdcliError as error:
        return str(error)


def files_of(folder: Path) -> list[Path]:
    return sorted(one for one in folder.rglob("*") if one.is_file() and ".staging" not in one.parts)


def names(folder: Path, file: Path, said: str) -> bool:
    """Whether the message leads to the file: by its name, or by column and shard."""
    column = str(file.relative_to(folder).parent.parent)
    by_shard = file.name[:6].isdecimal() and f"shard {file.name[:6]}" in said and column in said
    return file.name in said or by_shard


def flips(folder: Path, rng: random.Random) -> Iterator[list[Path]]:
    """Files to damage at the same time: a document that others are checked by alone, else one of each shard of each column."""
    documents = [*folder.glob("manifest.json"), *folder.glob("fields/*/field.json"), *folder.glob("teacher/*/*.json")]
    yield from ([one] for one in sorted(documents) for _ in range(3))
    others = [one for one in files_of(folder) if one not in documents]
    while True:
        places: dict[str, Path] = {}
        for file in rng.sample(others, len(others)):
            shard = file.name[:6].isdecimal()
            places.setdefault(f"{file.parent.parent} {file.name[:6]}" if shard else str(file), file)
        yield list(places.values())


def test_every_flip_anywhere_is_caught_and_named(standard_cache: Path, copy_of) -> None:
    folder, rng, done = copy_of(standard_cache), random.Random(3), 0
    assert said_of(folder) == ""
    for files in flips(folder, rng):
        whole = {file: file.read_bytes() for file in files}
        at = {file: (rng.randrange(len(data)), rng.randrange(8)) for file, data in whole.items()}
        for file, data in whole.items():
            byte, bit = at[file]
            file.write_bytes(data[:byte] + bytes([data[byte] ^ 1 << bit]) + data[byte + 1 :])
        said = said_of(folder)
        for file, data in whole.items():
            assert names(folder, file, said), f"{file.relative_to(folder)} {at[file]}: {said!r}"
            file.write_bytes(data)
        done += len(files)
        if done >= FLIPS:
            break
    assert said_of(folder) == ""


def test_every_missing_file_is_caught_and_named(standard_cache: Path, copy_of) -> None:
    folder = copy_of(standard_cache)
    for file in files_of(folder):
        whole = file.read_bytes()
        file.unlink()
        assert names(folder, file, said_of(folder)), file
        file.write_bytes(whole)


def reading(folder: Path, role: str, name: str) -> Callable[[], Any]:
    cache = TeacherCache(str(folder))
    return lambda: cache.open_field(name) if role == "calibration" else cache.low_rank_head(name)


ROLES = [(name, "calibration") for name in FIELDS] + [
    (f"{kind}_hidden", "low_rank_head") for kind in ("vision", "response")
]


@pytest.mark.parametrize(("name", "role"), ROLES)
def test_a_reader_names_the_file_and_the_field(standard_cache: Path, copy_of, name: str, role: str) -> None:
    folder = copy_of(standard_cache)
    (file,) = folder.glob(f"teacher/*/calibration/{name}-{role}-*")
    whole = file.read_bytes()
    reading(folder, role, name)()
    for damaged, said in (
        (whole[:50] + b"?" + whole[51:], "does not have the checksum that field"),
        (None, "is missing"),
    ):
        file.unlink() if damaged is None else file.write_bytes(damaged)
        with pytest.raises(CacheError, match=rf"{file.name}.* {said}|{file.name} {said}") as caught:
            reading(folder, role, name)()
        assert name in str(caught.value)
        assert f"fields/{name}: " in said_of(folder)
        with pytest.raises(CacheError, match=name):
            rows = CachedSamples(TeacherCache(str(folder)), ["sft"], [name])
            rows.read(0, 0)
            TeacherCache(str(folder)).low_rank_head(name)


def described_otherwise(folder: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> TeacherCache:
    file = folder / "fields" / name / "field.json"
    body = unseal(file.read_bytes(), "")
    change(body)
    file.write_bytes(seal(body))
    return TeacherCache(str(folder))


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "codec": (lambda b: b["params"].update(codec="jpeg"), "unknown codec 'jpeg': this version of kdcli reads"),
    "codec version": (
        lambda b: b["params"].update(codec_version=9),
        "codec sketch version 9 is not readable: this kdcli reads 1",
    ),
    "field version": (lambda b: b.update(version=9), "field vision_hidden version 9 is not readable"),
    "parameter": (lambda b: b["params"].update(wavelet=3), "field vision_hidden: .*wavelet"),
    "no calibration": (lambda b: b.pop("calibration"), "names no calibration, field vision_hidden cannot be read"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_what_this_program_does_not_know_is_refused_by_name(standard_cache: Path, copy_of, kind: str) -> None:
    change, said = CHANGES[kind]
    cache = described_otherwise(copy_of(standard_cache), "vision_hidden", change)
    with pytest.raises(KdcliError, match=said):
        cache.open_field("vision_hidden")
    cache.open_field("response_hidden")


def test_a_field_without_its_low_rank_head(standard_cache: Path, copy_of) -> None:
    cache = described_otherwise(copy_of(standard_cache), "vision_hidden", lambda b: b.pop("low_rank_head"))
    with pytest.raises(CacheError, match=r"fields/vision_hidden/field.json does not name a file"):
        cache.low_rank_head("vision_hidden")


def test_a_field_of_an_unknown_name(standard_cache: Path, copy_of) -> None:
    folder = copy_of(standard_cache)
    (folder / "fields" / "vision_topk").rename(folder / "fields" / "vision_aura")
    with pytest.raises(CacheError, match="unknown field 'vision_aura': this kdcli reads affinity, "):
        TeacherCache(str(folder)).open_field("vision_aura")


def test_an_exchanged_calibration_is_refused(standard_cache: Path, copy_of) -> None:
    """The other field's file under this one's name: right kind, wrong content."""
    folder = copy_of(standard_cache)
    one, two = (next(folder.glob(f"teacher/*/calibration/{k}_hidden-calibration-*")) for k in ("vision", "response"))
    one.write_bytes(two.read_bytes())
    with pytest.raises(CacheError, match="does not have the checksum that field vision_hidden names"):
        TeacherCache(str(folder)).open_field("vision_hidden")


def test_garbage_is_what_no_field_names(standard_cache: Path, copy_of) -> None:
    folder = copy_of(standard_cache)
    assert collect_garbage(TeacherCache(str(folder)), remove=False) == []
    (teacher,) = (one for one in (folder / "teacher").iterdir())
    stray = teacher / "calibration" / "vision_hidden-calibration-0123456789ab.safetensors"
    stray.write_bytes(b"of a slower writer")
    found = [str(stray.relative_to(folder))]
    assert collect_garbage(TeacherCache(str(folder)), remove=True) == found
    assert said_of(folder) == "" and collect_garbage(TeacherCache(str(folder)), remove=False) == []


def test_a_removed_field_leaves_its_calibration_as_garbage(standard_cache: Path, copy_of) -> None:
    import shutil

    folder = copy_of(standard_cache)
    shutil.rmtree(folder / "fields" / "vision_hidden")
    found = collect_garbage(TeacherCache(str(folder)), remove=True)
    assert len(found) == 2 and all("vision_hidden-" in name for name in found)
    assert said_of(folder) == ""


def test_field_json_says_what_it_is_read_with(standard_cache: Path) -> None:
    """Keys of ``FORMAT.md``."""
    for name in FIELDS:
        body = json.loads((standard_cache / "fields" / name / "field.json").read_bytes())
        assert set(body["calibration"]) == {"path", "sha256", "rows"} and body["calibration"]["rows"] > 0
        assert ("low_rank_head" in body) == name.endswith("_hidden")
        assert body["temperatures"] == ([1.0] if name.endswith("_topk") else None)
        assert body["head_sha256"] is None, "no whole head is stored for sketches"
    assert not list(standard_cache.glob("teacher/*/head*"))
