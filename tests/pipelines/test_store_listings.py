"""A store whose listings lag: what was written a moment ago can be read, and is not listed yet."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from click.testing import CliRunner

from cli import main
from pipelines.capture.cache_teacher import capture
from pipelines.capture.worker import CaptureRequest
from pipelines.inspect.cache import check
from teacher_cache.errors import CacheError
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.shards.commit import await_listed
from teacher_cache.shards.storage import Storage
from teacher_cache.sources import DataSpec

LAG_S = 1.0
COLUMNS = ("samples", "fields/relation")


class Lagging:
    """The store's application; objects younger than ``LAG_S`` are in no listing."""

    def __init__(self, application: Callable[..., Iterable[bytes]]):
        self.application, self.born, self.hidden = application, dict[str, float](), 0

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        key = environ["PATH_INFO"].removeprefix("/bucket/")
        if environ["REQUEST_METHOD"] in ("PUT", "POST"):
            self.born.setdefault(key, time.monotonic())
        if environ["REQUEST_METHOD"] != "GET" or "list-type=2" not in environ["QUERY_STRING"]:
            return self.application(environ, start_response)
        told: list[Any] = []
        body = b"".join(self.application(environ, lambda *given: told.extend(given))).decode()
        body = re.sub(r"<Contents>.*?<Key>(.*?)</Key>.*?</Contents>", self._old, body, flags=re.S)
        body = re.sub(r"<CommonPrefixes>\s*<Prefix>(.*?)</Prefix>\s*</CommonPrefixes>", self._old, body, flags=re.S)
        headers = [one for one in told[1] if one[0].lower() != "content-length"]
        start_response(told[0], [*headers, ("Content-Length", str(len(body.encode())))])
        return [body.encode()]

    def _old(self, found: re.Match[str]) -> str:
        keys = [key for key in self.born if key == found[1] or (found[1].endswith("/") and key.startswith(found[1]))]
        young = bool(keys) and all(time.monotonic() - self.born[key] < LAG_S for key in keys)
        self.hidden += young
        return "" if young else found[0]


@pytest.fixture
def lagging(healthy: Any, monkeypatch: pytest.MonkeyPatch) -> Lagging:
    store = Lagging(healthy.application)
    monkeypatch.setattr(healthy, "application", store)
    return store


@pytest.mark.exhaustive  # a whole job; what follows a lagging listing is tested piece by piece below
@pytest.mark.usefixtures("one_thread")
def test_a_capture_ends_well_and_so_does_what_follows(
    make_request: Callable[..., CaptureRequest], mixture: Sequence[DataSpec], lagging: Lagging
) -> None:
    url = "s3://bucket/lagging/one"
    few = [replace(part, limit=2) for part in mixture]
    summary = capture(make_request(url, data=few, shards=2, fields=("relation",)))
    assert lagging.hidden and summary["work"] is None
    assert {name: one["done"] for name, one in summary["columns"].items()} == dict.fromkeys(COLUMNS, 2)
    assert check(TeacherCache(url)) == []
    run = CliRunner().invoke(
        main, ["cache", "subset", url, "--out", "s3://bucket/lagging/two", "--parts", "sft", "--json"]
    )
    assert run.exit_code == 0, run.output
    assert check(TeacherCache("s3://bucket/lagging/two")) == [] and set(
        TeacherCache("s3://bucket/lagging/two").fields
    ) == {"relation"}


def test_what_is_never_listed_is_said(lagging: Lagging, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teacher_cache.shards.commit.LONGEST_LAG_S", 0.1)
    storage = Storage("s3://bucket/lagging/never")
    assert storage.put_new("samples/commits/000000.json", b"x")
    with pytest.raises(CacheError, match=r"samples/commits/000000.json exists, but its store has not listed it"):
        await_listed(storage, {0: ["samples"]})
    await_listed(storage, {1: ["samples"]}, ["relation"])  # another run's: not waited for
