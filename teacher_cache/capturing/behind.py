"""Behind the teacher: rows are encoded in threads and windows are written in their order, while it works on the next batch.

Threads, not processes: two thirds of encoding (numpy, torch and zstd on large arrays) run outside of the interpreter's lock, no array is
copied to another process, and none outlives its command. Which thread encodes a row decides no byte of it; rows are written in their order.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from time import perf_counter
from typing import Any

import torch

from teacher_cache.codecs import container
from teacher_cache.errors import KdcliError, OutOfMemory
from teacher_cache.fields import Field
from teacher_cache.records import Prepared, Sample, TeacherOutput

ENCODING_BYTES = 1 << 30
"""Of all rows that are being encoded at one time, with what that takes on the way."""
ON_THE_WAY = 8
"""Bytes that encoding takes on the way for each byte of an answer: float32 copies of bfloat16 states, coefficients, indices."""
Record = dict[str, bytes] | None
"""Column → bytes of a row; None where what the teacher said is not finite."""


@dataclass
class Waits:
    """Seconds that a teacher waited: for rows to be ``encoded``, and behind that for them to be ``written``."""

    encoded: float = 0.0
    written: float = 0.0


class Behind:
    """Encodes rows in ``workers`` threads, and runs one job that writes at a time in another.

    ``write`` first waits for the job before it, and raises what that raised; leaving the block without an error does the same. So at most
    one window lies behind the one that the teacher works on. An error of the block drops the rows that no thread has begun.
    """

    def __init__(self, workers: int = 1, waits: Waits | None = None) -> None:
        self._encoders = ThreadPoolExecutor(workers, thread_name_prefix="encode")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._room = Room(ENCODING_BYTES)
        self._waits = waits or Waits()
        self._rows: deque[Future[Record]] = deque()
        self._last: Future[Any] | None = None

    def encode(self, weight: int, job: Callable[..., Record], *arguments: Any) -> Future[Record]:
        """A row's record to come. weight: bytes of its answer. Raises what the last ``write`` has raised by now."""
        if self._last is not None and self._last.done():
            self._last.result()
        return self._encoders.submit(self._in_room, weight * ON_THE_WAY, job, *arguments)

    def _in_room(self, size: int, job: Callable[..., Record], *arguments: Any) -> Record:
        with self._room.of(size):
            return job(*arguments)

    def write(self, rows: deque[Future[Record]], job: Callable[..., Any], *arguments: Any) -> None:
        """Run ``job(rows, *arguments)``, which takes each row out of the queue once it is encoded."""
        self._wait()
        self._rows, self._last = rows, self._writer.submit(job, rows, *arguments)

    def _wait(self) -> None:
        if self._last is None:
            return
        began = perf_counter()
        wait(self._rows.copy(), return_when=FIRST_EXCEPTION)
        encoded = perf_counter()
        self._last.result()
        self._waits.encoded += encoded - began
        self._waits.written += perf_counter() - encoded

    def __enter__(self) -> Behind:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        try:
            if kind is None:
                self._wait()
        finally:
            self._encoders.shutdown(wait=True, cancel_futures=True)
            self._writer.shutdown(wait=True)


class Room:
    """So many bytes, for whoever asks; one who asks for more than all of them gets in alone."""

    def __init__(self, most: int):
        self._most, self._used, self._changed = most, 0, threading.Condition()

    @contextmanager
    def of(self, size: int) -> Iterator[None]:
        """Wait for so many bytes, and hold them in this block."""
        with self._changed:
            self._changed.wait_for(lambda: not self._used or self._used + size <= self._most)
            self._used += size
        try:
            yield
        finally:
            with self._changed:
                self._used -= size
                self._changed.notify_all()


def encode_row(sample: Sample, prepared: Prepared, output: TeacherOutput, fields: Mapping[str, Field]) -> Record:
    """What every field stores of a row; a KdcliError of a field names the row.

    Args:
        fields: by column.
    """
    with beside_the_teacher(output.device):
        if not is_finite(output):
            return None
        try:
            return {column: container.pack(one.encode(prepared, output)) for column, one in fields.items()}
        except OutOfMemory:
            raise
        except KdcliError as error:
            raise type(error)(f"{sample.place}: row {prepared.key} cannot be encoded: {error}") from None
        except Exception as error:
            error.add_note(f"{sample.place}: row {prepared.key} was being encoded")
            raise


def beside_the_teacher(device: torch.device) -> AbstractContextManager[Any]:
    """What is computed in this context does not queue behind the batch that the teacher is at: a stream of its own on a GPU.

    All threads share it, so that what one has put there (a basis, an order of symbols) is there for the others.
    """
    return torch.cuda.stream(_side_stream(device)) if device.type == "cuda" else nullcontext()


_making = threading.Lock()


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    with _making:  # one for all threads
        return _made_stream(device)


@cache
def _made_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)


def is_finite(output: TeacherOutput) -> bool:
    """False where anything that the teacher said is NaN or infinite (an empty tail, -inf, is no defect)."""
    heads = [column for head in output.topk.values() for column in (head.log_probs, head.log_z)]
    samples = [column for one in output.sampled.values() for column in (one.weights, one.entropy)]
    tensors = [*output.hidden.values(), *output.attention.values(), *heads, *samples]
    tensors += [one for one in (output.gram, output.features) if one is not None]
    return all(_all_finite(tensor) for tensor in tensors)


def _all_finite(tensor: torch.Tensor) -> bool:
    """NaN and infinity survive a sum, which is one pass without a mask; a sum that merely overflows is looked at again."""
    return bool(torch.isfinite(tensor.sum(dtype=torch.float32))) or bool(torch.isfinite(tensor).all())
