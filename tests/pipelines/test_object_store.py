"""A cache in an object store: a real S3 API on loopback (moto), healthy and with every fifth request failing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cli import main
from pipelines.capture.cache_teacher import capture
from pipelines.capture.worker import CaptureRequest
from pipelines.inspect.cache import check
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.shards.storage import Storage


def cache_in(url: str) -> dict[str, bytes]:
    """Every file of a cache in the store."""
    storage = Storage(url)
    return {name: storage.read(name) for name in storage.files("") if not name.startswith(".staging")}


@pytest.mark.exhaustive  # below the same job runs while every fifth request fails
@pytest.mark.usefixtures("healthy", "one_thread")
def test_a_whole_job_in_a_bucket(
    make_request: Callable[..., CaptureRequest], tiny_student: Path, tmp_path: Path
) -> None:
    """Captured, checked, trained from: the cache of a local disk, byte by byte."""
    local, url = tmp_path / "local", "s3://bucket/caches/one"
    capture(make_request(local))
    capture(make_request(url))
    assert cache_in(url) == cache_in(str(local))
    assert check(TeacherCache(url)) == []
    run = CliRunner().invoke(main, ["cache", "status", url])
    assert run.exit_code == 0 and "31 written" in run.output
    flags = ["--cache", url, "--student", str(tiny_student), "--output-dir", str(tmp_path / "run")]
    run = CliRunner().invoke(
        main, ["train-student", "--method", "llava-kd", *flags, "--stages", "DFT", "--max-steps", "2"]
    )
    assert run.exit_code == 0, run.output


@pytest.mark.usefixtures("one_thread")
def test_every_fifth_request_fails(make_request: Callable[..., CaptureRequest], tmp_path: Path, healthy: Any) -> None:
    few = {"shards": 2, "fields": ("response_hidden",)}
    capture(make_request(tmp_path / "local", **few))
    healthy.rate = 0.2
    capture(make_request("s3://bucket/faulty", **few))
    assert healthy.failed > 5
    assert check(TeacherCache("s3://bucket/faulty")) == []
    assert cache_in("s3://bucket/faulty") == cache_in(str(tmp_path / "local"))


@pytest.mark.usefixtures("healthy")
def test_the_first_writer_wins() -> None:
    storage = Storage("s3://bucket/first")
    assert storage.put_new("commits/000000.json", b"mine") and not storage.put_new("commits/000000.json", b"yours")
    assert storage.read("commits/000000.json") == b"mine"


@pytest.mark.usefixtures("healthy")
def test_no_such_bucket() -> None:
    run = CliRunner().invoke(main, ["cache", "status", "s3://nowhere/cache"])
    assert run.exit_code == 1 and "s3://nowhere/cache" in run.output and "Traceback" not in run.output


@pytest.mark.usefixtures("healthy")
@pytest.mark.parametrize("name", ["a::b", "s3::x", "a*[1]", "a{1}", "a b", "a%20b", "a#b", "a?b", "ä", "~"])
def test_a_prefix_means_itself(name: str, tmp_path: Path) -> None:
    storage, file = Storage(f"s3://bucket/odd/{name}/cache/"), tmp_path / "x.tar"
    file.write_bytes(b"tar")
    storage.put_file(file, "data/x.tar")
    assert storage.put_new("commits/0.json", b"1") and not storage.put_new("commits/0.json", b"2")
    assert list(storage.read_each(["commits/0.json", "data/x.tar"])) == [b"1", b"tar"]
    assert storage.read_ranges([("data/x.tar", 1, 3)]) == [b"ar"] and storage.size("data/x.tar") == 3
    assert storage.files("") == ["commits/0.json", "data/x.tar"] and storage.names("data") == ["x.tar"]
    with storage.local_copy("data/x.tar") as copy:
        assert copy.read_bytes() == b"tar"
    client = storage.fs.call_s3("list_objects_v2", Bucket="bucket", Prefix="odd/")
    assert [one["Key"] for one in client["Contents"]] == [
        f"odd/{name}/cache/{key}" for key in ("commits/0.json", "data/x.tar")
    ]
    for key in storage.files(""):
        storage.remove(key)
