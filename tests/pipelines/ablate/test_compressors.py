"""Compressors as an axis of a grid: decided and checked before any student trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from pipelines.ablate.run import AblateRequest, ablate, dry_run
from teacher_cache.errors import KdcliError

GRID = """
[grid]
method = "sft"
stages = "PT,SFT"
compressor = ["none", "adaptive_pool", "mqt"]
"""


@pytest.mark.exhaustive  # three students; a grid from the command line stays
@pytest.mark.usefixtures("forked_cells")
def test_every_compressor_is_a_student_of_its_own(write_grid: Callable[..., Path], tmp_path: Path) -> None:
    import io

    grid, out = write_grid(GRID), tmp_path / "out"
    body = ablate(AblateRequest(grid, out, workers=2), Console(file=io.StringIO()))
    assert body["failed"] == []
    assert {one["state"] for one in dry_run(AblateRequest(grid, out))[0]} == {"done"}
    assert len(list((out / "stages").glob("PT-*"))) == 3, "the first stage is not shared"


def test_what_cannot_be_compressed_is_refused_first(write_grid: Callable[..., Path], tmp_path: Path) -> None:
    rows = GRID + "vision_tokens = 16\n"
    with pytest.raises(KdcliError, match=r"leave vision_tokens|choose --vision-tokens from"):
        dry_run(AblateRequest(write_grid(rows), tmp_path / "out"))
    aligned = GRID.replace("sft", "llava-kd").replace('"none", ', "").replace("PT,SFT", "PT,DFT")
    with pytest.raises(KdcliError, match=r"llava-kd compares .* one by one"):
        dry_run(AblateRequest(write_grid(aligned), tmp_path / "out"))
