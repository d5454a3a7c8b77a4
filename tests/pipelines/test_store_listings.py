"""A store whose listings lag: what was written a moment ago can be read, and is not listed yet."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cli import main
from pipelines.cache_teacher import capture
from pipelines.capture_shards import CaptureRequest
from pipelines.inspect_cache import check
from student_train.cache import Cache

LAG_S = 5.0


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


@pytest.mark.usefixtures("one_thread")
def test_a_capture_ends_well(make_request: Callable[..., CaptureRequest], tmp_path: Path, healthy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lagging = Lagging(healthy.application)
    monkeypatch.setattr(healthy, "application", lagging)
    url = "s3://bucket/lagging"
    few: dict[str, Any] = {"shards": 2, "fields": ("response_hidden", "relation")}
    summary = capture(make_request(url, **few))
    assert lagging.hidden
    print(summary)
    assert all(one["done"] == 2 for one in summary["columns"].values()) and len(summary["columns"]) == 3
    assert check(Cache(url)) == []
