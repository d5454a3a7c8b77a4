"""Bytes of one folder of the cache, as the writer would lay them out: tars with their padding, indices, commits."""

from __future__ import annotations

import math
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, pstdev, variance
from typing import Any

from pipelines.judge.plan.field_sizes import EXACT, FieldSize, member_bytes
from pipelines.judge.plan.mixture_sample import PartSample, SampledRow
from teacher_cache.codecs import container
from teacher_cache.planning.make_plan import CHARACTERS_PER_TOKEN, GROUP_ROWS
from teacher_cache.shards.commit import Commit
from teacher_cache.shards.index import Entry, TarMember, dump_index

FIELD_JSON_BYTES = 2_000
MANIFEST_BYTES = 4_000
"""Of ``field.json`` and of a manifest besides its row groups."""
BALANCED = 0.5
"""Slices are balanced by tokens: their sizes scatter less than sums of random rows would."""
PLACES = 32
"""Tar sizes that a mean goes over."""


@dataclass(frozen=True)
class ColumnEstimate:
    """One folder of the cache. ``token_rows``: rows it stores over all samples, None for ``samples``; ``basis``: where bytes come from."""

    name: str
    samples: int
    token_rows: int | None
    bytes: int
    tar_bytes: int
    tars: int
    basis: str


def members_of(row: SampledRow, part: str, size: FieldSize | None) -> Mapping[str, int]:
    """Extension → bytes of one row's members in a column; ``size`` None: ``samples``."""
    return row.members if size is None else {container.EXTENSION: size.record(part, row.counts)}


def row_bytes(row: SampledRow, part: str, size: FieldSize | None) -> float:
    """Bytes of a tar that one row takes."""
    if size is not None:
        return size.in_tar(part, row.counts)
    return sum(map(member_bytes, row.members.values()))


def tars_by_part(parts: Sequence[PartSample], shards: int) -> dict[str, int]:
    """Shards of each part, by its share of the tokens as ``make_plan`` guesses them; a shard never straddles parts."""
    cost = {part.part: part_cost(part) for part in parts if part.rows}
    counts = dict.fromkeys(cost, 1)
    for _ in range(shards - len(cost)):
        counts[max(cost, key=lambda part: cost[part] / counts[part])] += 1
    return counts


def part_cost(part: PartSample) -> float:
    characters = part.characters * part.rows / max(1, part.scanned)
    return characters / CHARACTERS_PER_TOKEN + part.total(lambda row: row.counts.vision) + part.rows


def column_estimate(
    name: str, size: FieldSize | None, stored: Sequence[PartSample], tars: Mapping[str, int]
) -> ColumnEstimate:
    """Tars, indices, commits and description of one column.

    Args:
        size: of its records; None: ``samples``. stored: the parts that it has. tars: shards of each part.
    """
    each = [part_bytes(part, size, tars[part.part]) for part in stored if part.rows]
    in_tars, about = (round(sum(one[i] for one in each)) for i in (0, 1))
    rows = None
    if size is not None:
        rows = round(sum(part.total(lambda row: size.rows(row.counts)) for part in stored))
    samples = round(sum(part.total(lambda row: 1) for part in stored))
    total = in_tars + about + (FIELD_JSON_BYTES if size else 0)
    number = sum(tars[part.part] for part in stored if part.rows)
    return ColumnEstimate(name, samples, rows, total, in_tars, number, size.basis if size else EXACT)


def part_bytes(part: PartSample, size: FieldSize | None, tars: int) -> tuple[float, float]:
    """Bytes of one part's tars, and of their indices and commits."""
    content = part.total(lambda row: row_bytes(row, part.part, size)) / tars
    each = [row_bytes(row, part.part, size) for row in part.usable] + [0.0] * len(part.skipped)
    scatter = BALANCED * pstdev(each) * math.sqrt(part.rows / tars) if each else 0.0
    entries = [entry_of(row, part.part, size) for row in part.usable]
    index = index_bytes(entries, part.total(lambda row: 1) / tars)
    commit = commit_bytes(part.skipped, part.weight * len(part.skipped) / tars)
    return tars * padded_tar(content, scatter), tars * (index + commit)


def padded_tar(content: float, scatter: float) -> float:
    """Mean bytes of a tar whose members take ``content`` ± ``scatter`` bytes: two empty blocks more, then up to a multiple of 10,240.

    Half a record of padding on average where tars differ by more than that, but all of it where each holds a row or two.
    """
    spread = NormalDist(content + 2 * tarfile.BLOCKSIZE, max(1.0, scatter))
    sizes = [max(1.0, spread.inv_cdf((place + 0.5) / PLACES)) for place in range(PLACES)]
    return sum(tarfile.RECORDSIZE * math.ceil(size / tarfile.RECORDSIZE) for size in sizes) / PLACES


def entry_of(row: SampledRow, part: str, size: FieldSize | None) -> Entry:
    counts = row.counts
    members, at = [], row.ordinal * round(row_bytes(row, part, size))
    for ext, count in members_of(row, part, size).items():
        members.append(TarMember(ext, at + 512, count, zlib.crc32(f"{row.key}.{ext}".encode())))
        at += member_bytes(count)
    return Entry(row.key, row.ordinal, counts.vision, counts.response, counts.text, tuple(members))


def index_bytes(entries: Sequence[Entry], rows: float) -> float:
    """Bytes of an index of ``rows`` rows: of one that is written so long, or carried on from the sampled rows."""
    if not entries:
        return len(dump_index([]))
    if rows <= len(entries):
        return len(dump_index(list(entries[: max(1, round(rows))])))
    whole = len(dump_index(list(entries)))
    half = len(entries) // 2
    if not half:
        return whole * rows
    return whole + (whole - len(dump_index(list(entries[:half])))) / (len(entries) - half) * (rows - len(entries))


def commit_bytes(skipped: Sequence[Any], count: float) -> float:
    """Bytes of a commit with ``count`` skip records like those of the sample."""

    def written(skips: Sequence[Any]) -> int:
        counts = dict.fromkeys(("vision_rows", "response_rows", "text_tokens"), 100_000)
        names = ("000000-00000000.tar", 10**8, "0" * 64, "000000-00000000-00000000.parquet", "0" * 64)
        return len(Commit(0, "0" * 64, "0" * 64, *names, 1000, 1000, tuple(skips), counts).to_bytes())

    bare = written(())
    return bare + count * (written(skipped) - bare) / max(1, len(skipped))


def manifest_bytes(parts: Sequence[PartSample], shards: int) -> int:
    """``manifest.json`` names every row group; a small mixture in many shards has finer ones."""
    total = float(MANIFEST_BYTES)
    for part in parts:
        groups = math.ceil(part.rows / GROUP_ROWS)
        if groups < 2 * shards:
            groups = math.ceil(part.rows / max(1, part.rows // (4 * shards))) if part.rows else 0
        total += groups * part.locator_bytes
    return round(total)


def sampling_error(parts: Sequence[PartSample], bare: set[str], sizes: Mapping[str, FieldSize]) -> float:
    """Half a 95 % interval of all bytes, from the scatter between sampled rows (skipped ones count as 0 bytes)."""
    total = 0.0
    for part in parts:
        columns: list[FieldSize | None] = [None] if part.part in bare else [None, *sizes.values()]
        each = [sum(row_bytes(row, part.part, size) for size in columns) for row in part.usable]
        each += [0.0] * len(part.skipped)
        if len(each) > 1:
            total += part.rows**2 * variance(each) / len(each) * max(0.0, 1 - len(each) / part.rows)
    return 1.96 * math.sqrt(total)
