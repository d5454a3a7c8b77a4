"""Windows are written in a thread: in order, one at a time, and no error is lost. Finiteness is one sum, with a second look."""

from __future__ import annotations

import threading

import pytest
import torch

from teacher_cache.cache_shard import WriteBehind, is_finite
from teacher_cache.records import TeacherOutput
from teacher_cache.teachers.head import CHUNK_BYTES, LARGE_CHUNK_BYTES, chunk_rows


def test_jobs_run_in_order_in_another_thread() -> None:
    done: list[tuple[int, int]] = []
    with WriteBehind() as behind:
        for number in range(5):
            behind.submit(lambda n: done.append((n, threading.get_ident())), number)
    assert [number for number, _ in done] == [0, 1, 2, 3, 4]
    assert {thread for _, thread in done}.isdisjoint({threading.get_ident()})


def test_an_error_comes_out_at_the_next_job_or_at_the_end() -> None:
    def fail() -> None:
        raise OSError("disk full")

    ran: list[int] = []
    with pytest.raises(OSError, match="disk full"), WriteBehind() as behind:
        behind.submit(fail)
        behind.submit(ran.append, 1)
    assert ran == []
    with pytest.raises(OSError, match="disk full"), WriteBehind() as behind:
        behind.submit(fail)


def test_an_error_of_the_caller_waits_for_the_writer_and_wins() -> None:
    finished = threading.Event()
    with pytest.raises(KeyboardInterrupt), WriteBehind() as behind:
        behind.submit(lambda: finished.wait(0.2) or finished.set())
        raise KeyboardInterrupt
    assert finished.is_set()


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
