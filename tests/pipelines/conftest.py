"""Caches of the standard profile, and what tests of whole captures share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch


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
