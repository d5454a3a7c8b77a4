"""A grid end to end: fresh processes, shared stages, continuing, failing, and what a changed grid costs."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from pipelines.ablate.run import AblateRequest, ablate, dry_run


def go(grid: Path, out: Path, **asked: Any) -> dict[str, Any]:
    return ablate(AblateRequest(grid, out, workers=2, **asked), Console(file=io.StringIO()))


def states(grid: Path, out: Path) -> dict[str, str]:
    return {one["name"]: one["state"] for one in dry_run(AblateRequest(grid, out))[0]}


def test_two_variants_two_seeds(write_grid: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    grid = write_grid(top='baseline = "sft"\n')
    assert set(states(grid, out).values()) == {"new"}
    body = go(grid, out)
    assert body["failed"] == [] and set(states(grid, out).values()) == {"done"}
    print(body["markdown"])
    # One PT a seed serves both rows.
    assert len(list((out / "stages").glob("PT-*"))) == 2 and len(list((out / "stages").iterdir())) == 6
