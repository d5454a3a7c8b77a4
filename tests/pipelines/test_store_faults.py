"""An object store that breaks connections, loses answers and refuses: the job succeeds, or ends in one line that names URL and fix."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from click.testing import CliRunner

from cli import main
from pipelines.capture.cache_teacher import capture
from pipelines.capture.worker import CaptureRequest
from teacher_cache.errors import CacheError
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.reading.cached_samples import CachedSamples
from teacher_cache.reading.verify import verify
from teacher_cache.shards.storage import Storage

FIELDS = ("response_hidden", "vision_topk")


@pytest.fixture(scope="module")
def uploaded(store: Any, tiny_cache: Path) -> str:
    """``tiny_cache`` in the bucket."""
    store.rate = 0.0
    fsspec.filesystem("s3").put(str(tiny_cache), "bucket/tiny", recursive=True)
    return "s3://bucket/tiny"


def all_keys(rows: CachedSamples) -> list[str]:
    places = [(position, row) for position, count in enumerate(rows.counts) for row in range(count)]
    return [row.key for row in rows.read_many(places)]


def test_connections_break_while_reading(uploaded: str, shaky: Any, tiny_cache: Path) -> None:
    local = TeacherCache(str(tiny_cache))
    cache = TeacherCache(uploaded)
    shaky.rate = 0.1
    columns = {"samples": "", "fields/vision_topk": cache.fields["vision_topk"]["sha256"]}
    assert verify(cache.storage, columns) == []
    assert all_keys(CachedSamples(cache, ["sft"], FIELDS)) == all_keys(CachedSamples(local, ["sft"], FIELDS))
    assert sum(shaky.broken.values()) > 5 and all(shaky.broken.values())


@pytest.mark.exhaustive  # test_object_store.py captures while requests fail
@pytest.mark.usefixtures("one_thread")
def test_connections_break_while_capturing(
    make_request: Callable[..., CaptureRequest], tmp_path: Path, shaky: Any, mixture: Any
) -> None:
    few: dict[str, Any] = {"shards": 1, "fields": ("response_hidden",), "data": mixture[:1]}
    capture(make_request(tmp_path / "local", **few))
    shaky.rate = 0.1
    capture(make_request("s3://bucket/shaky", **few))
    shaky.rate = 0.0
    assert any(shaky.broken.values())
    ours, theirs = Storage("s3://bucket/shaky"), Storage(tmp_path / "local")
    names = [name for name in theirs.files("") if not name.startswith(".staging")]
    assert ours.files("") == names
    assert all(ours.read(name) == theirs.read(name) for name in names)


def test_a_commit_whose_answer_is_lost_is_ours(healthy: Any) -> None:
    lost = []

    def lose_first(environ: dict[str, Any], served: bool) -> str | None:
        if environ["REQUEST_METHOD"] == "PUT" and served and not lost:
            lost.append(environ["PATH_INFO"])
            return "500 Internal Server Error"
        return None

    healthy.refuse = lose_first
    storage = Storage("s3://bucket/lost")
    assert storage.put_new("commits/000000.json", b"mine") and lost
    assert not storage.put_new("commits/000000.json", b"yours")
    assert storage.read("commits/000000.json") == b"mine"


def test_an_upload_in_parts(healthy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused in the middle it leaves nothing; healthy, it is the file."""
    part = 5 << 20
    monkeypatch.setattr("s3fs.core.calculate_chunksize", lambda size, chunksize=None: part)
    content = bytes(range(256)) * (13 * part // 5 // 256)
    storage, file = Storage("s3://bucket/parts"), tmp_path / "big.tar"

    def refuse(environ: dict[str, Any], served: bool) -> str | None:
        return "403 Forbidden" if "partNumber=2" in environ["QUERY_STRING"] else None

    healthy.refuse = refuse
    file.write_bytes(content)
    with pytest.raises(CacheError, match=r"s3://bucket/parts/data/big.tar: .*may not"):
        storage.put_file(file, "data/big.tar")
    assert not storage.exists("data/big.tar") and file.exists()
    assert "Uploads" not in fsspec.filesystem("s3").call_s3("list_multipart_uploads", Bucket="bucket")
    healthy.refuse = lambda environ, served: None
    storage.put_file(file, "data/big.tar")
    assert storage.read("data/big.tar") == content and not file.exists()


def status_of(url: str) -> str:
    fsspec.filesystem("s3").clear_instance_cache()
    run = CliRunner().invoke(main, ["cache", "status", url])
    assert run.exit_code == 1 and "Traceback" not in run.output and len(run.output.strip().splitlines()) == 1
    assert url in run.output
    return run.output


def test_what_will_not_pass_is_said_at_once(uploaded: str, healthy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no such bucket" in status_of("s3://nowhere/cache")
    healthy.refuse = lambda environ, served: "403 Forbidden"
    assert "credentials may not" in status_of(uploaded)
    monkeypatch.setenv("KDCLI_STORE_TRIES", "1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody listens there
    assert "the store failed" in status_of(uploaded)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, "/nowhere")
    assert "AWS_ACCESS_KEY_ID" in status_of(uploaded)
    fsspec.filesystem("s3").clear_instance_cache()


def test_a_quarter_of_the_answers_breaks_and_a_batch_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two hundred ranges none is asked for again that came."""
    storage, shaken = Storage("memory://quarter"), random.Random(7)
    storage.fs.pipe_file(storage.path("data/x.tar"), bytes(range(256)) * 4)
    asked: list[int] = []
    cat_ranges = type(storage.fs).cat_ranges

    def breaking(self: Any, paths: list[str], starts: Any, stops: Any, **named: Any) -> list[Any]:
        asked.append(len(paths))
        answers = cat_ranges(self, paths, starts, stops, **named)
        kinds = (ConnectionResetError("reset"), b"")  # broken off, or fewer bytes than asked for
        return [shaken.choice(kinds) if shaken.random() < 0.25 else one for one in answers]

    monkeypatch.setattr(type(storage.fs), "cat_ranges", breaking)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    ranges = [("data/x.tar", start, start + 3) for start in range(200)]
    assert storage.read_ranges(ranges) == [bytes(range(256))[start : start + 3] for start in range(200)]
    assert asked[0] == 200 and sum(asked) < 200 * 1.6
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError):
        list(storage.read_each(["data/x.tar"] * 9 + ["data/none.tar"]))


def test_rows_arrive_without_a_local_cache_at_a_quarter_of_faults(uploaded: str, shaky: Any, tiny_cache: Path) -> None:
    rows = CachedSamples(TeacherCache(uploaded), ["sft"], FIELDS)
    shaky.rate = 0.25
    assert all_keys(rows) == all_keys(CachedSamples(TeacherCache(str(tiny_cache)), ["sft"], FIELDS))
    assert sum(shaky.broken.values()) > 5


def test_bytes_damaged_on_their_way_are_asked_for_once_more(tiny_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = fsspec.filesystem("memory")
    files.put(str(tiny_cache), "/flipped", recursive=True)
    keys = all_keys(CachedSamples(TeacherCache(str(tiny_cache)), ["sft"], FIELDS))
    cat_ranges, flips = type(files).cat_ranges, [3]

    def flipping(self: Any, *given: Any, **named: Any) -> list[bytes]:
        answers = cat_ranges(self, *given, **named)
        if given[0][0].endswith(".tar") and flips[0]:
            flips[0] -= 1
            answers = [bytes([answers[0][0]]) + bytes(len(answers[0]) - 1), *answers[1:]]
        return answers

    monkeypatch.setattr(type(files), "cat_ranges", flipping)
    rows = CachedSamples(TeacherCache("memory://flipped"), ["sft"], FIELDS)
    places = [(position, row) for position, count in enumerate(rows.counts) for row in range(count)]
    flips[0] = 1
    assert [row.key for row in rows.read_many(places)] == keys and not flips[0]
    flips[0] = 1000  # damaged in the store
    with pytest.raises(CacheError, match="fails its checksum"):
        rows.read_many(places[:1])
    files.rm("/flipped", recursive=True)
