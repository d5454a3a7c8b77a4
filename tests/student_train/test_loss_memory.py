"""The losses' memory grows with a chunk, not with the rows: live bytes of every tensor, counted as they come and go."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.loss_memory import CROSS_ENTROPY, TARGET, TEACHERS, WHOLE, make_step, variants
from student_train.losses import reduce
from teacher_cache.models import head

VOCABULARY, WIDTH, CHUNK_ROWS = 2000, 4, 32
ROW = 4 * VOCABULARY


class LiveBytes(TorchDispatchMode):
    """``peak``: the most bytes of storages that were made under this mode and lived at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for one in tree_leaves((args, kwargs)):
            if isinstance(one, torch.Tensor):
                self._count(one.untyped_storage(), made_here=False)
        result = func(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if isinstance(one, torch.Tensor):
                self._count(one.untyped_storage(), made_here=True)
        return result

    def _count(self, storage: Any, made_here: bool) -> None:
        key, size = storage._cdata, storage.nbytes() if made_here else 0
        if key in self.seen:
            return
        self.seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


@pytest.fixture
def peak(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``peak(variant, rows)`` → live bytes of one loss and its gradients, in small chunks and pieces of two rows."""
    monkeypatch.setattr(reduce, "CHUNK_BYTES", ROW * CHUNK_ROWS)
    monkeypatch.setitem(head.PIECE_BYTES, "cpu", 2 * ROW)

    class Options:
        device, vocabulary, width = "cpu", VOCABULARY, WIDTH

    def measure(variant: str, rows: int) -> int:
        step = make_step(variant, rows, Options)
        with LiveBytes() as live:
            step()
        return live.peak

    return measure


@pytest.mark.parametrize("variant", [name for name in variants() if name != WHOLE])
def test_more_rows_take_no_more_than_their_hidden_states(peak: Any, variant: str) -> None:
    """Eight times the rows: what grows is far below one more row of logits each."""
    few, many = peak(variant, 2 * CHUNK_ROWS), peak(variant, 16 * CHUNK_ROWS)
    assert many - few < 14 * CHUNK_ROWS * ROW / 20
    assert few < 2.2 * CHUNK_ROWS * ROW


def test_whole_logits_do_grow(peak: Any) -> None:
    """The counter sees what it is meant to see."""
    assert peak(WHOLE, 16 * CHUNK_ROWS) > 2 * 16 * CHUNK_ROWS * ROW


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("divergence", ["forward KL", "reverse KL", "JSD"])
def test_a_divergence_costs_little_beside_cross_entropy(peak: Any, divergence: str, teacher: str) -> None:
    rows = 4 * CHUNK_ROWS
    assert peak(f"{divergence}, {teacher}", rows) <= TARGET * peak(CROSS_ENTROPY, rows)
