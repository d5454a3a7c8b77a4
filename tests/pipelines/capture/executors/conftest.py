"""What every executor must give: the cache that one process gives, byte by byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def cache_files() -> Callable[[Path], dict[str, bytes]]:
    """``cache_files(folder)`` → every file that belongs to the cache there."""

    def files(folder: Path) -> dict[str, bytes]:
        found = (f for f in sorted(folder.rglob("*")) if f.is_file() and ".staging" not in f.parts)
        return {str(f.relative_to(folder)): f.read_bytes() for f in found}

    return files


@pytest.fixture(scope="module")
def alone(make_request, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache as one process on one thread makes it."""
    from pipelines.capture.cache_teacher import capture

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("alone") / "cache"
    capture(make_request(out))
    torch.set_num_threads(before)
    return out
