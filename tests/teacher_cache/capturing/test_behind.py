"""Behind the teacher: rows are encoded in threads, windows written in order, one at a time, and no error is lost.

Finiteness is one sum, with a second look.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any

import pytest
import torch

from teacher_cache.capturing import behind as module
from teacher_cache.capturing.behind import Behind, Waits, is_finite
from teacher_cache.models.head import CHUNK_BYTES, LARGE_CHUNK_BYTES, chunk_rows
from teacher_cache.records import TeacherOutput


def none() -> deque[Any]:
    return deque()


def test_jobs_run_in_order_in_another_thread() -> None:
    done: list[tuple[int, int]] = []
    with Behind() as behind:
        for number in range(5):
            behind.write(none(), lambda _, n: done.append((n, threading.get_ident())), number)
    assert [number for number, _ in done] == [0, 1, 2, 3, 4]
    assert {thread for _, thread in done}.isdisjoint({threading.get_ident()})


def test_rows_are_encoded_beside_one_another_and_written_in_their_order() -> None:
    """The first row is done last: four threads meet in a barrier that one alone would wait at for ever."""
    met, written = threading.Barrier(4, timeout=20), list[Any]()

    def encode(number: int) -> Any:
        met.wait()
        time.sleep(0.02 * (4 - number))
        return number

    def write(rows: deque[Any]) -> None:
        while rows:
            written.append(rows.popleft().result())

    with Behind(4) as behind:
        for _ in range(2):
            behind.write(deque([behind.encode(1, encode, number) for number in range(4)]), write)
    assert written == [0, 1, 2, 3] * 2


def test_no_more_bytes_are_encoded_at_a_time_than_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row beyond all of them is encoded alone."""
    monkeypatch.setattr(module, "ENCODING_BYTES", 10 * module.ON_THE_WAY)
    lock, weights = threading.Lock(), list[int]()
    seen: list[tuple[int, ...]] = []

    def encode(weight: int) -> Any:
        with lock:
            weights.append(weight)
            seen.append(tuple(weights))
        time.sleep(0.002)
        with lock:
            weights.remove(weight)

    with Behind(8) as behind:
        for weight in (5, 4, 1, 11, 3, 3, 3, 3, 30, 10) * 2:
            behind.encode(weight, encode, weight)
        time.sleep(0.2)
    assert len(seen) == 20 and all(sum(one) <= 10 or len(one) == 1 for one in seen)
    assert max(map(len, seen)) > 1


def test_the_teacher_waits_for_the_window_before_and_says_how_long() -> None:
    """So at most one window lies behind it, however slow encoders and disks are."""
    waits, alive = Waits(), list[int]()

    def encode(number: int) -> Any:
        time.sleep(0.05)

    def write(rows: deque[Any], number: int) -> None:
        while rows:
            rows[0].result()
            rows.popleft()
        time.sleep(0.02)
        alive.remove(number)

    with Behind(1, waits) as behind:
        for number in range(3):
            alive.append(number)
            assert len(alive) <= 2
            behind.write(deque([behind.encode(1, encode, number)]), write, number)
    assert waits.encoded > 0.1 and waits.written > 0.04, "two or three of each"


def test_an_error_comes_out_at_the_next_row_or_job_or_at_the_end() -> None:
    def fail(*_: Any) -> Any:
        raise OSError("disk full")

    ran: list[int] = []
    for last in (lambda one: one.write(none(), ran.append), lambda one: one.encode(1, ran.append, 1), lambda one: None):
        with pytest.raises(OSError, match="disk full"), Behind() as behind:
            behind.write(none(), fail)
            time.sleep(0.01)
            last(behind)
    assert ran == []


def test_an_error_of_the_caller_waits_for_what_is_begun_drops_the_rest_and_wins() -> None:
    begun, encoded, finished = threading.Event(), list[int](), threading.Event()

    def encode(number: int) -> Any:
        begun.set()
        time.sleep(0.05)
        encoded.append(number)

    with pytest.raises(KeyboardInterrupt), Behind() as behind:
        behind.write(none(), lambda _: finished.wait(0.2) or finished.set())
        rows = [behind.encode(1, encode, number) for number in range(50)]
        begun.wait(20)
        raise KeyboardInterrupt
    assert finished.is_set() and len(encoded) < 50
    assert all(row.cancelled() for row in rows[len(encoded) :])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_finite_rows_whose_sum_overflows_are_finite(dtype: torch.dtype) -> None:
    large = torch.full((4, 8), torch.finfo(dtype).max, dtype=dtype)
    assert is_finite(TeacherOutput(hidden={"vision": large}))
    for bad in (float("nan"), float("inf"), float("-inf")):
        broken = large.clone()
        broken[1, 3] = bad
        assert not is_finite(TeacherOutput(hidden={"vision": broken}))
    opposite = large.clone()
    opposite[0, 0], opposite[0, 1] = float("inf"), float("-inf")
    assert not is_finite(TeacherOutput(hidden={"vision": opposite}))


def test_chunks_are_small_for_narrow_heads_and_large_for_wide_ones() -> None:
    assert chunk_rows(torch.empty(4160, 2), CHUNK_BYTES) == CHUNK_BYTES // (4 * 4160)
    assert chunk_rows(torch.empty(152_064, 1), CHUNK_BYTES) == LARGE_CHUNK_BYTES // (4 * 152_064)
    assert chunk_rows(torch.empty(500, 2), 1) == 1
