"""Mixtures scanned and cut into slices: a new plan.

Groups are permuted by seed inside a part before slicing and slices are balanced by estimated tokens, so no shard is all text-only or
all long.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from teacher_cache.errors import KdcliError, printable
from teacher_cache.planning.plan import MOST_SHARD_ROWS, Part, Plan, Slice, is_same_data
from teacher_cache.preparing.templates import template_fingerprint
from teacher_cache.records import RowGroup
from teacher_cache.sources import DataSpec, Source, open_source

GROUP_ROWS = 500
CHARACTERS_PER_TOKEN = 4


def make_plan(
    specs: Sequence[DataSpec],
    shards: int,
    preparation: Mapping[str, Any],
    seed: int,
    image_tokens: int,
    known: Plan | None = None,
) -> Plan:
    """Scan the mixtures and cut them into ``shards`` slices.

    Args:
        image_tokens: vision tokens of a typical image, only for balancing.
        known: a plan that is taken again where it was made of the same files and settings: files are then hashed, not scanned.
    """
    if shards < 1:
        raise KdcliError(f"--shards must be at least 1, got {shards}")
    names = [spec.part for spec in specs]
    if nameless := [name for name in names if not name.strip() or printable(name) != name or "\n" in name]:
        raise KdcliError(
            f"a part is called {nameless[0]!r}: its name must be text on one line: use --part or `part = …`"
        )
    if len(set(names)) != len(names):
        raise KdcliError(
            f"mixture parts must have different names, got {', '.join(names)}: use --part or `part = …` in kd.toml"
        )
    if known and (again := _again(known, specs, shards, preparation, seed)):
        return again
    scanned = [_scan(spec, shards) for spec in specs]
    if not any(part.rows for part, _ in scanned):
        raise KdcliError(f"the mixture holds no rows: {', '.join(spec.path for spec in specs)}")
    check_shards(shards, [part.rows for part, _ in scanned])
    filled = [(part, groups) for part, groups in scanned if part.rows]

    def cost(group: RowGroup) -> int:
        return group.characters // CHARACTERS_PER_TOKEN + group.images * image_tokens + group.rows

    counts = _shards_per_part(
        [sum(map(cost, groups)) for _, groups in filled], [part.rows for part, _ in filled], shards
    )
    slices: list[Slice] = []
    for (part, groups), count in zip(filled, counts):
        groups = list(groups)
        random.Random(f"{seed}:{part.spec.part}").shuffle(groups)
        slices += [Slice(part.spec.part, tuple(chosen)) for chosen in _balance(groups, count, cost)]
    if (most := max(one.rows for one in slices)) > MOST_SHARD_ROWS:
        raise KdcliError(
            f"--shards {shards} makes shards of {most:,} rows, at most {MOST_SHARD_ROWS:,} are read: give more --shards"
        )
    return Plan(tuple(part for part, _ in scanned), tuple(slices), preparation, seed)


def check_shards(shards: int, rows: Sequence[int]) -> None:
    """Every shard has a row, and rows of one part alone. rows: of each part; KdcliError naming what fits."""
    total, filled = sum(rows), sum(count > 0 for count in rows)
    if shards > total:
        raise KdcliError(
            f"--shards {shards} is more than the {total} rows of the mixture: use at most --shards {total}"
        )
    if shards < filled:
        raise KdcliError(
            f"--shards {shards}: a shard never straddles parts, so {filled} parts need at least that many shards"
        )


def _again(
    known: Plan, specs: Sequence[DataSpec], shards: int, preparation: Mapping[str, Any], seed: int
) -> Plan | None:
    """``known`` with the places where its files lie now, or None where anything that a plan is made of differs."""
    settings = len(known.slices), known.seed, known.preparation, known.derived
    if settings != (shards, seed, preparation, None) or len(known.parts) != len(specs):
        return None
    parts = []
    for part, spec in zip(known.parts, specs):
        if replace(part.spec, path=spec.path, image_root=spec.image_root) != spec:
            return None
        fingerprint = part_fingerprint(spec, open_source(spec))
        if not is_same_data(fingerprint, part.fingerprint):
            return None
        parts.append(Part(spec, fingerprint, part.rows))
    return replace(known, parts=tuple(parts))


def part_fingerprint(spec: DataSpec, source: Source) -> dict[str, Any]:
    """What binds a plan to a part: its files, and the template where that is one of ours."""
    return {**source.fingerprint(), **template_fingerprint(spec.template)}


def _scan(spec: DataSpec, shards: int) -> tuple[Part, list[RowGroup]]:
    source = open_source(spec)
    groups = source.scan(GROUP_ROWS)
    rows = sum(group.rows for group in groups)
    if rows and len(groups) < 2 * shards:
        # A small mixture in many shards: finer groups balance and mix better, and every shard gets at least one.
        groups = source.scan(max(1, rows // (4 * shards)))
    return Part(spec, part_fingerprint(spec, source), rows), groups


def _shards_per_part(costs: list[int], rows: list[int], shards: int) -> list[int]:
    """At least one shard a part, at most one a row, the rest by cost (largest remainder)."""
    counts = [1] * len(costs)
    for _ in range(shards - len(costs)):
        open_parts = [i for i in range(len(costs)) if counts[i] < rows[i]]
        counts[max(open_parts, key=lambda i: costs[i] / counts[i])] += 1
    return counts


def _balance(groups: list[RowGroup], count: int, cost: Any) -> list[list[RowGroup]]:
    """Greedy by falling cost into the lightest slice; inside a slice the shuffled order stands."""
    place = {id(group): i for i, group in enumerate(groups)}
    heap: list[tuple[int, int, int]] = [(0, 0, i) for i in range(count)]
    chosen: list[list[RowGroup]] = [[] for _ in range(count)]
    for group in sorted(groups, key=cost, reverse=True):
        weight, size, i = heapq.heappop(heap)
        chosen[i].append(group)
        heapq.heappush(heap, (weight + cost(group), size + 1, i))
    return [sorted(one, key=lambda group: place[id(group)]) for one in chosen]
