"""Memory: a head in a sketch's basis is as large as the teacher's, and each rung of the ladder has its own."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.judge.preflight import ladder
from pipelines.judge.preflight.request import PreflightRequest
from pipelines.judge.preflight.run import preflight
from teacher_cache.models.low_rank import LowRankHead


def test_whole_gradients_stand_beside_one_head_of_the_frontier(
    ask: Callable[..., PreflightRequest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of the way which is confirmed; of the others nothing holds the weight, stored or as it is read."""
    weights: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    begin, compare = LowRankHead.__init__, ladder.compare

    def noting(self: LowRankHead, weight: torch.Tensor, *others: Any) -> None:
        begin(self, weight, *others)
        weights.append(weakref.ref(weight))

    def counting(*asked: Any) -> Any:
        alive.append(sum(one() is not None for one in weights))
        return compare(*asked)

    monkeypatch.setattr(LowRankHead, "__init__", noting)
    monkeypatch.setattr(ladder, "compare", counting)
    preflight(ask(tmp_path / "out", methods=("llava-kd",), rows=12))
    assert len(alive) >= 2 and set(alive) == {1}, "both kinds are confirmed, each beside its own head"
    assert len(weights) > 2 * len(ladder.STEPS), "as they are fitted, and as they are read"
