"""Caches of the standard profile, what tests of whole captures share, and a storage whose writer dies after a number of writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from teacher_cache.shards.storage import Storage


@pytest.fixture
def one_thread():
    """Sums split over threads round differently; one thread makes bytes comparable between processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def standard(make_request, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete cache of the standard profile, made on one thread."""
    from pipelines.cache_teacher import capture

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("standard") / "cache"
    capture(make_request(out, fields=(), store="standard"))
    torch.set_num_threads(before)
    return out


@pytest.fixture(scope="session")
def preparer(teacher_parts) -> Any:
    from teacher_cache.prepare import Preparer

    return Preparer(*teacher_parts)


class Mortal:
    """Storage whose methods ``names`` fail after ``budget`` calls; below 0 nothing fails."""

    class Killed(BaseException):
        """The process dies: nothing catches it, nothing is cleaned up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *names: str):
        self.budget = -1
        monkeypatch.setattr("teacher_cache.shards.writer.ShardWriter.abandon", lambda writer: None)
        for name in names:
            monkeypatch.setattr(Storage, name, self._dying(getattr(Storage, name)))

    def _dying(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(storage: Storage, *arguments: Any, **named: Any) -> Any:
            if self.budget == 0:
                raise self.Killed
            self.budget -= 1
            return real(storage, *arguments, **named)

        return call

    def until_done(self, job: Callable[[], Any], budget: int, look: Callable[[], None] = lambda: None) -> int:
        """Run ``job`` again and again, each time dying after ``budget`` calls, with a ``look`` after every death; how often it died."""
        for deaths in range(200):
            self.budget = budget
            try:
                job()
            except self.Killed:
                self.budget = -1
                look()
            else:
                self.budget = -1
                return deaths
        raise AssertionError("the job never ends")


@pytest.fixture
def make_mortal(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Mortal]:
    """``make_mortal("put_file", "put_new")`` → Mortal."""
    return lambda *names: Mortal(monkeypatch, *names)
