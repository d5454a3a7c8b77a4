"""A cache in an object store: a real S3 API on loopback (moto), healthy and with every fifth request failing."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from click.testing import CliRunner

from cli import main
from pipelines.cache_teacher import CaptureRequest, capture
from pipelines.inspect_cache import check
from student_train.cache import Cache
from teacher_cache.shards.storage import Storage

pytest.importorskip("s3fs")
moto = pytest.importorskip("moto.server")

SLOW_DOWN = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)


class Faulty:
    """The store's application; ``rate`` of its requests are answered with 503 SlowDown or 500, and counted."""

    def __init__(self, application: Callable[..., Iterable[bytes]]):
        self.application, self.rate, self.failed, self.served = application, 0.0, 0, 0
        self._random = random.Random(1)

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if self._random.random() >= self.rate:
            self.served += 1
            return self.application(environ, start_response)
        self.failed += 1
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        status = self._random.choice(["503 Slow Down", "500 Internal Server Error"])
        start_response(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(SLOW_DOWN)))])
        return [SLOW_DOWN]


@pytest.fixture(scope="module")
def store() -> Iterator[Faulty]:
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    faulty = Faulty(moto.DomainDispatcherApplication(moto.create_backend_app))
    server = make_server("127.0.0.1", 0, faulty, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    names = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**names, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}"}.items():
            patch.setenv(name, value)
        fsspec.filesystem("s3").mkdir("bucket")
        yield faulty
    server.shutdown()


@pytest.fixture
def healthy(store: Faulty) -> Faulty:
    store.rate = 0.0
    return store


def cache_in(url: str) -> dict[str, bytes]:
    """Every file of a cache in the store."""
    storage = Storage(url)
    return {name: storage.read(name) for name in storage.files("") if not name.startswith(".staging")}


@pytest.mark.usefixtures("healthy", "one_thread")
def test_a_whole_job_in_a_bucket(
    make_request: Callable[..., CaptureRequest], tiny_student: Path, tmp_path: Path
) -> None:
    """Captured, checked, trained from: the cache of a local disk, byte by byte."""
    local, url = tmp_path / "local", "s3://bucket/caches/one"
    capture(make_request(local))
    capture(make_request(url))
    assert cache_in(url) == cache_in(str(local))
    assert check(Cache(url)) == []
    run = CliRunner().invoke(main, ["cache", "status", url])
    assert run.exit_code == 0 and "31 written" in run.output
    flags = ["--cache", url, "--student", str(tiny_student), "--output-dir", str(tmp_path / "run")]
    run = CliRunner().invoke(
        main, ["train-student", "--method", "llava-kd", *flags, "--stages", "DFT", "--max-steps", "2"]
    )
    assert run.exit_code == 0, run.output


@pytest.mark.usefixtures("one_thread")
def test_every_fifth_request_fails(
    make_request: Callable[..., CaptureRequest], tmp_path: Path, healthy: Faulty
) -> None:
    few = {"shards": 2, "fields": ("response_hidden",)}
    capture(make_request(tmp_path / "local", **few))
    healthy.rate = 0.2
    capture(make_request("s3://bucket/faulty", **few))
    assert healthy.failed > 5
    assert check(Cache("s3://bucket/faulty")) == []
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
