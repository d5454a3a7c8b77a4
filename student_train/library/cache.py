"""A teacher cache opened from Python."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch

from student_train.dataset import TrainBatch
from student_train.library.dataset import CacheDataset
from student_train.library.signal_request import request_signals
from student_train.library.signals import SignalSource, TeacherSignals
from student_train.methods import DEFAULT, Method
from student_train.needs import Need
from student_train.order import InPlace
from teacher_cache.errors import CacheError, KdcliError
from teacher_cache.models.kind import open_processor
from teacher_cache.preparing.batch import Batch
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.reading.cached_samples import CachedSamples
from teacher_cache.reading.teacher_tokenizer import tokenizer_of
from teacher_cache.shards.disk_cache import DiskCache


def open_cache(url: str) -> Cache:
    """Open a finished cache: a folder, or an address of fsspec (``s3://…``, ``gs://…``, ``https://…``).

    Raises:
        CacheError: there is none, or what describes it is damaged; one line.
    """
    return Cache(url)


class Cache:
    """A cache's plan, fields and rows. Opening it reads descriptions only; no tar is touched.

    Attributes:
        url: as it is shown (without passwords). parts: of the mixture. fields: name → parameters (codec, k, …) as ``field.json`` says.
        reader: ``teacher_cache.reading.cache.TeacherCache``, the machinery's own.
    """

    def __init__(self, url: str):
        self.reader = TeacherCache(url)
        self.url = str(self.reader.storage)
        self.parts: tuple[str, ...] = tuple(self.reader.parts())
        self.fields: Mapping[str, Mapping[str, Any]] = {n: body["params"] for n, body in self.reader.fields.items()}

    @cached_property
    def rows(self) -> Mapping[str, int]:
        """Part → rows that ``samples`` holds. CacheError where the capture is not finished."""
        request_signals(self.reader, None, None, ())
        return {part: sum(CachedSamples(self.reader, [part], ()).counts) for part in self.parts}

    def __len__(self) -> int:
        """Rows of all parts."""
        return sum(self.rows.values())

    @property
    def teacher(self) -> Mapping[str, Any]:
        """Fingerprint of the teacher: weights, tokenizer, head width, hidden size, dtype, …

        Raises:
            CacheError: several teachers made the fields, or no field is there.
        """
        found = {str(sorted(body["teacher"].items(), key=str)): body["teacher"] for body in self.reader.fields.values()}
        if len(found) != 1:
            told = "several teachers made its fields" if found else "no field is there, so no teacher is known"
            raise CacheError(f"{self.url}: {told}: look at .reader.fields[NAME]['teacher']")
        return next(iter(found.values()))

    @cached_property
    def tokenizer(self) -> Any:
        """The teacher's tokenizer, as the cache keeps it; None where no field stored one."""
        return tokenizer_of(self.reader)

    def dataset(
        self,
        parts: Sequence[str] | None = None,
        *,
        processor: Any,
        config: Any = None,
        method: str | Method | None = None,
        needs: Iterable[str | Need] | str | None = None,
        preset: str = DEFAULT,
        knobs: Mapping[str, Any] | None = None,
        fields: Sequence[str] = (),
        max_length: int | None = None,
        local_cache: str | None = None,
        local_cache_gb: float = 100.0,
    ) -> CacheDataset:
        """Rows as a student reads them, with what a method (or ``needs``) asks of the teacher.

        Args:
            parts: of the mixture; None: all.
            processor: the student's ``AutoProcessor``; or its folder or hub id.
            config: the student's configuration (``model.config``); not needed where ``processor`` is a folder.
            method: a name with ``preset`` and ``knobs``, or an object with ``needs()`` and ``terms()``.
            needs: instead of a method: ``response_logits``, ``vision_hidden``, … (docs/library.md), or ``Need``; ``[]`` for none.
            fields: that are read besides, whatever they hold: ``TeacherSignals.records``.
            max_length: another limit of tokens than the capture's. local_cache, local_cache_gb: folder that keeps tars of an object store.

        Raises:
            CompatibilityError: the cache does not serve it, or the student's vocabulary is another.
            CacheError: the capture of a part is not finished.
        """
        request = request_signals(self.reader, parts, method, needs, preset, knobs, fields)
        if isinstance(processor, str):
            processor, config = open_processor(f"student {processor!r}", processor)
        if processor is None or config is None:
            raise KdcliError("give the student's processor with config=model.config, or its folder as processor")
        request.check_student(self.reader, processor, config)
        disk = DiskCache(local_cache, int(local_cache_gb * 1e9)) if local_cache else None
        rows = CachedSamples(self.reader, request.parts, request.names, disk)
        return CacheDataset(self.reader, request, rows, processor, config, max_length)

    def signals(
        self,
        rows: Sequence[int],
        *,
        needs: Iterable[str | Need] | str | None = None,
        method: str | Method | None = None,
        fields: Sequence[str] = (),
        parts: Sequence[str] | None = None,
        device: torch.device | str = "cpu",
    ) -> TeacherSignals:
        """What the teacher says of a few rows (numbers from 0 over ``parts``), without any student: no ``positions``."""
        request = request_signals(self.reader, parts, method, needs, fields=fields)
        read = CachedSamples(self.reader, request.parts, request.names)
        places = InPlace(read.counts)
        if wrong := [one for one in rows if not 0 <= one < places.rows]:
            raise CacheError(
                f"{self.url}: no row {wrong[0]}: part {', '.join(request.parts)} has {places.rows} rows, counted from 0"
            )
        if not rows:
            raise KdcliError("signals: give the numbers of one row or more")
        found = read.read_many([places.at(one) for one in rows])
        responses = [one.text.response_ids.to(torch.int64) for one in found]
        counts = {
            **dict.fromkeys(("response", "answer"), tuple(map(len, responses))),
            "vision": tuple(sum(image.tokens() for image in one.layout) for one in found),
        }
        batch = Batch(tuple(one.key for one in found), {}, {}, counts, torch.cat(responses))
        records = {name: [one.fields[name] for one in found] for name in request.names}
        whole = TrainBatch(batch, tuple(one.text for one in found), records, tuple(one.layout for one in found))
        return TeacherSignals(
            SignalSource(self.reader.storage.url, request.served.fields, self.reader), whole, str(device)
        )

    def __repr__(self) -> str:
        return f"<kdcli.Cache {self.url}: parts {', '.join(self.parts)}; fields {', '.join(sorted(self.fields))}>"
