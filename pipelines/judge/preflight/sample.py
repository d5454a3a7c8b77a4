"""A few hundred rows of a mixture as a plan of its own: spread evenly over parts and files, a third of them held out to judge."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipelines.judge.fidelity.rows import FidelitySample
from pipelines.settings import CaptureSettings
from teacher_cache.errors import KdcliError, SkipSample
from teacher_cache.planning.make_plan import GROUP_ROWS, check_shards, part_fingerprint
from teacher_cache.planning.plan import Part, Plan, Slice, parts_with_images
from teacher_cache.preparing.batch import row_positions
from teacher_cache.preparing.prepare import Preparer
from teacher_cache.records import RowGroup, SkipRecord
from teacher_cache.sources import DataSpec, Source, open_source

SLICES = 3
"""Of every part: two to choose and calibrate on, the last to judge."""
MOST_GROUPS = 100_000
"""Row groups of one part that are held in memory while a few of them are chosen."""
MOST_TIMES = 8
"""As many rows as were asked for may be taken where those hold too few tokens to fit on."""
LEAST_SHARE = 4
"""A small part beside a large one still has 1/4 of what an equal share would be."""


@dataclass(frozen=True)
class Wanted:
    """Token rows that calibrations are fitted on at least, of each of these kinds."""

    rows: int
    kinds: Sequence[str]


def enough_rows(
    specs: Sequence[DataSpec], rows: int, preparer: Preparer, capture: CaptureSettings, wanted: Wanted
) -> tuple[Plan, dict[bool, list[FidelitySample]]]:
    """(the plan, its usable rows: False to fit on, True held out): ``rows`` rows, more where they hold too few tokens to fit on.

    Raises:
        KdcliError: no more are to be had, or they would be more than ``MOST_TIMES`` as many.
    """
    asked, bare = rows, set(capture.parts_without_fields)
    while True:
        plan = sample_plan(specs, asked, preparer.fingerprint(), capture)
        for part in parts_with_images(plan.slices):
            preparer.check_images(part, plan.spec(part).template)
        held = held_out(plan)
        sides = {
            side: read_rows(plan, preparer, [one for n, one in enumerate(plan.slices) if (n in held) is side])
            for side in (False, True)
        }
        fitting = [row.teacher for row in sides[False] if row.sample.part not in bare]
        have = {kind: sum(len(row_positions(row)[kind]) for row in fitting) for kind in wanted.kinds}
        short = min(have, key=lambda kind: have[kind], default="")
        if not short or not fitting or have[short] >= wanted.rows:
            return plan, sides
        more = math.ceil(1.1 * asked * wanted.rows / max(1, have[short]))
        exhausted = asked > sum(part.rows for part in plan.parts)
        if not have[short] or exhausted or more > MOST_TIMES * rows:
            said = (
                f"calibration: {len(fitting)} rows hold {have[short]} {short} tokens, {wanted.rows} are wanted to fit"
            )
            raise KdcliError(f"{said} {short}_hidden: {remedy(have[short], more, exhausted)}, or --store exact")
        asked = more


def remedy(have: int, more: int, exhausted: bool) -> str:
    """What to do about a sample with too few tokens of a kind."""
    if not have:
        return "use rows that have some"
    return "the mixture has no more: add rows to it" if exhausted else f"give --rows {more}"


def sample_plan(specs: Sequence[DataSpec], rows: int, preparation: Mapping[str, Any], capture: CaptureSettings) -> Plan:
    """About ``rows`` rows of the mixture in ``SLICES`` slices a part; part names must differ. capture: of the whole job."""
    names = [spec.part for spec in specs]
    if len(set(names)) != len(names):
        raise KdcliError(f"mixture parts must have different names, got {', '.join(names)}: use --part")
    sources = [open_source(spec) for spec in specs]
    scanned = [source.scan(GROUP_ROWS) for source in sources]
    sizes = [sum(group.rows for group in groups) for groups in scanned]
    if not sum(sizes):
        raise KdcliError(f"the mixture holds no rows: {', '.join(spec.path for spec in specs)}")
    check_shards(capture.shards, sizes)
    parts, slices = [], []
    for spec, source, groups, size in zip(specs, sources, scanned, sizes):
        share = min(size, max(round(rows * size / sum(sizes)), rows // (LEAST_SHARE * len(specs)), SLICES))
        chosen = spread(source, groups, size, share)
        parts.append(Part(spec, part_fingerprint(spec, source), sum(group.rows for group in chosen)))
        dealt = [tuple(chosen[number::SLICES]) for number in range(SLICES)]
        slices += [Slice(spec.part, groups) for groups in dealt if groups]
    plan = Plan(tuple(parts), tuple(slices), preparation, capture.seed)
    if not held_out(plan):
        raise KdcliError(f"the mixture has {sum(sizes)} rows: a preflight needs at least {SLICES} of one part")
    return plan


def spread(source: Source, groups: list[RowGroup], size: int, count: int) -> list[RowGroup]:
    """Small row groups at even distances, ``count`` rows in all or a few more."""
    if not count:
        return []
    each = -(-size // MOST_GROUPS)
    groups = source.scan(each) if each < GROUP_ROWS else groups
    wanted = max(min(SLICES, len(groups)), -(-count // each))
    distance = max(1.0, len(groups) / wanted)
    return [groups[int(number * distance)] for number in range(min(wanted, len(groups)))]


def held_out(plan: Plan) -> frozenset[int]:
    """Slices whose rows nothing is fitted on: the last of every part that has all its slices."""
    by_part: dict[str, list[int]] = {}
    for number, one in enumerate(plan.slices):
        by_part.setdefault(one.part, []).append(number)
    return frozenset(numbers[-1] for numbers in by_part.values() if len(numbers) == SLICES)


def without_held_out(plan: Plan) -> Plan:
    """The plan that calibration reads; it is never written."""
    held = held_out(plan)
    return replace(plan, slices=tuple(one for number, one in enumerate(plan.slices) if number not in held))


def read_rows(plan: Plan, preparer: Preparer, slices: Sequence[Slice]) -> list[FidelitySample]:
    """Usable rows of some slices, as the teacher reads them, with no record of any field."""
    found = []
    sources = {part.spec.part: open_source(part.spec) for part in plan.parts}
    for one in slices:
        spec = plan.spec(one.part)
        for sample in (row for group in one.groups for row in sources[one.part].read(group)):
            if isinstance(sample, SkipRecord):
                continue
            try:
                prepared = preparer.prepare(sample, spec.template, spec.max_image_pixels)
            except SkipSample:
                continue  # the capture of the same rows records it with its reason
            found.append(FidelitySample(prepared.key, sample, prepared, {}))
    return found
