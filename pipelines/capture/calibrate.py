"""Before the job: the teacher reads a few hundred rows, and every field that needs it learns its tables and bases from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from teacher_cache.capturing import cache_shard
from teacher_cache.capturing.behind import is_finite
from teacher_cache.capturing.cache_shard import Teacher
from teacher_cache.capturing.capture_job import SampleReader
from teacher_cache.errors import KdcliError, SkipSample
from teacher_cache.fields import CalibratedField, wants_of
from teacher_cache.fields.calibration import Calibration
from teacher_cache.planning.plan import Plan, Slice
from teacher_cache.planning.same_samples import SteadySamples
from teacher_cache.preparing.batch import row_positions
from teacher_cache.preparing.prepare import Preparer
from teacher_cache.records import Prepared, Sample, SkipRecord, TeacherOutput
from teacher_cache.sources import DataSpec
from teacher_cache.wants import NOTHING, Wants

MOST_ROWS = 1 << 16
"""Rows of one kind that a fit looks at: enough for any width, and a bound on its memory."""


def calibrate(
    fields: Mapping[str, CalibratedField],
    plan: Plan,
    preparer: Preparer,
    teacher: Teacher,
    head: torch.Tensor,
    samples: int,
    batch_tokens: int,
    parts_without_fields: frozenset[str] = frozenset(),
    row_reader: Callable[[int], SampleReader] | None = None,
) -> dict[str, Calibration]:
    """Fit every given field on the same samples, spread evenly over the plan.

    Args:
        head: W ``[V, D]``. samples: how many rows of the mixture the teacher reads.
        row_reader: shard → where its rows are read; None: from the mixture.
    """
    wants = wants_of(fields.values())
    prepared = calibration_samples(plan, preparer, samples, parts_without_fields, row_reader, wants)
    outputs = ask(teacher, prepared, wants, batch_tokens)
    if not outputs:
        raise KdcliError("calibration found no usable row: run `kdcli doctor`")
    try:
        return {name: fit(field, outputs, head) for name, field in fields.items()}
    except KdcliError as error:
        if len(prepared) >= samples or hidden_rows(prepared, wants) > MOST_ROWS // 2:
            raise
        said = str(error).partition(": raise --calibration-rows")[0]  # there are no more
        raise KdcliError(
            f"{said}, and these are all {len(prepared)} usable rows of the mixture: add rows, or use --store exact, "
            "which needs no calibration"
        ) from None


def fit(field: CalibratedField, outputs: Sequence[TeacherOutput], head: torch.Tensor) -> Calibration:
    """On the head's device; on the CPU where a GPU that holds the teacher has no room for it."""
    try:
        return field.fit(outputs, head)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
    return field.fit([replace(one, device=torch.device("cpu")) for one in outputs], head.cpu())


def calibration_samples(
    plan: Plan,
    preparer: Preparer,
    samples: int,
    parts_without_fields: frozenset[str],
    row_reader: Callable[[int], SampleReader] | None = None,
    wants: Wants = NOTHING,
) -> list[Prepared]:
    """The first usable rows of every slice in turn, until there are enough: every part and kind of row has its share.

    Where they have more than ``MOST_ROWS`` hidden states of what the fields want, every second of them goes, and again, as they come:
    neither pixels nor answers of more are ever in memory.
    """
    reader_of = row_reader or mixture_reader(plan)
    shards = {id(one): shard for shard, one in enumerate(plan.slices)}
    order = [shards[id(one)] for one in spread(plan.slices, parts_without_fields)]
    readers = [_usable_rows(plan, preparer, reader_of(shard), shard) for shard in order]
    kept: list[Prepared] = []
    found, stride = 0, 1
    while readers and found < samples:
        still = []
        for reader in readers:
            row = next(reader, None)
            if row is not None:
                kept += [row] if found % stride == 0 else []
                found += 1
                still.append(reader)
            while hidden_rows(kept, wants) > MOST_ROWS and len(kept) > 1:
                kept, stride = kept[::2], 2 * stride
            if found == samples:
                break
        readers = still
    return kept


def hidden_rows(prepared: Sequence[Prepared], wants: Wants) -> int:
    """Hidden states of the kind of which these rows have the most."""
    return sum(max((len(row_positions(one)[kind]) for kind in wants.hidden), default=0) for one in prepared)


def spread(slices: Sequence[Slice], parts_without_fields: frozenset[str]) -> list[Slice]:
    """The slices that have fields, parts mixed by their shares: any first few are of every part, however many slices there are."""
    by_part: dict[str, list[Slice]] = {}
    for one in slices:
        if one.part not in parts_without_fields:
            by_part.setdefault(one.part, []).append(one)
    places = [(i / len(own), number, one) for number, own in enumerate(by_part.values()) for i, one in enumerate(own)]
    return [one for *_, one in sorted(places, key=lambda place: place[:2])]


def mixture_reader(plan: Plan, seen: Mapping[str, list[int]] | None = None) -> Callable[[int], SampleReader]:
    """Shard → the mixture part that its rows are read from. seen: as ``SteadySamples`` takes it."""
    sources = {part.spec.part: SteadySamples(part, seen or {}) for part in plan.parts}
    return lambda shard: sources[plan.slices[shard].part]


def _usable_rows(plan: Plan, preparer: Preparer, reader: SampleReader, shard: int) -> Iterator[Prepared]:
    rows = (row for group in plan.slices[shard].groups for row in reader.read(group))
    return usable_rows(rows, preparer, plan.spec(plan.slices[shard].part))


def usable_rows(rows: Iterable[Sample | SkipRecord], preparer: Preparer, spec: DataSpec) -> Iterator[Prepared]:
    """Those of a part's rows that a capture would not skip."""
    for row in rows:
        if isinstance(row, SkipRecord):
            continue
        try:
            yield preparer.prepare(row, spec.template, spec.max_image_pixels)
        except SkipSample:
            continue


def ask(teacher: Teacher, prepared: Sequence[Prepared], wants: Wants, batch_tokens: int) -> list[TeacherOutput]:
    """The finite outputs of the samples, in their order."""
    return [one for one in cache_shard.ask(teacher, prepared, wants, batch_tokens) if is_finite(one)]


def thin(outputs: Sequence[TeacherOutput]) -> list[TeacherOutput]:
    """Whole samples left out, evenly, where the vision rows of all together are more than ``MOST_ROWS``."""
    rows = sum(max((len(one) for one in output.hidden.values()), default=0) for output in outputs)
    stride = -(-rows // MOST_ROWS) or 1
    return list(outputs[::stride])
