"""Stages of a cell are links, and a disk without links is named."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from pipelines.ablate.cell import link_stages
from teacher_cache.errors import KdcliError


def test_a_disk_without_symbolic_links_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def symlink(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "symlink", symlink)
    cell = tmp_path / "row" / "seed-0"
    cell.mkdir(parents=True)
    with pytest.raises(KdcliError, match=rf"{cell}/01-PT: .*not permitted.*symbolic links"):
        link_stages(cell, [{"name": "01-PT", "shared": "PT-0"}])
