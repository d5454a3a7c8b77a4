"""Rows that cannot be used: looked for before the job, counted behind it, and taken in again when their cause is gone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import log

from teacher_cache.capturing.cache_shard import skip_record
from teacher_cache.capturing.capture_job import CaptureJob, SampleReader
from teacher_cache.errors import CacheError, KdcliError, SkipSample
from teacher_cache.planning.plan import Part, Plan
from teacher_cache.planning.same_samples import PICTURE_REASONS, groups_of, has_pictures, spread_rows
from teacher_cache.preparing.prepare import Preparer
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.records import SkipRecord
from teacher_cache.shards.commit import committed_shards, read_commit, read_commits
from teacher_cache.shards.mender import ShardReplacer
from teacher_cache.sources import open_source

PROBE_ROWS = 128
"""Of every part, spread over its row groups: seconds to prepare, where a job takes hours."""
DOUBT = 1e-3
"""How seldom a mixture with as many skips as are allowed is refused by chance."""
NEARLY_ALL = 0.9
OF_TEACHER = "nonfinite_teacher"
FIXES = {  # reason → what to do about it with a flag
    "image_missing": "check --image-root ({root})",
    "image_path_unsafe": "check --image-root ({root}), or allow your own links with --follow-links",
    "over_length": "raise --max-length, or give --over-length cut",
    OF_TEACHER: "check the teacher's weights, or give another --dtype",
}
OF_TEXT = "give a teacher that reads images, or a mixture of text"
UNREAD = "images_unread"
"""Rows with images, of a teacher that reads text alone: it was told so before the job, and such skips are no excess."""


def unread_images(plan: Plan, preparer: Preparer) -> list[str]:
    """Before the job: a line for every part whose rows with images are skipped, since the teacher reads text alone."""
    images = {part.spec.part: 0 for part in plan.parts}
    for one in plan.slices:
        images[one.part] += sum(group.images for group in one.groups)
    return [
        f"part {part!r}: its rows with images ({count:,} images) are skipped: the teacher is text-only"
        for part, count in images.items()
        if count and not preparer.reads_images
    ]


def refuse_skips(plan: Plan, preparer: Preparer, allowed: float) -> None:
    """Before anything is loaded or written: KdcliError where rows of a part are skipped for a reason that should be mended first.

    That is one that flags mend (``FIXES``), of more rows than ``allowed`` (a share; of pictures that are not there: of the rows that have
    some), or whatever it is where nearly all rows are skipped. Other defects of the data are counted behind the job (``excess``).
    """
    for part in plan.parts:
        source = open_source(part.spec)
        rows = list(spread_rows(source.read, groups_of(plan, part.spec.part), PROBE_ROWS))
        skipped = [one for row in rows if (one := look_at(row, part, preparer))]
        pictured = sum(map(has_pictures, rows))
        counts = Counter(one.reason for one in skipped).most_common()
        for reason, count in counts:
            of = pictured if reason in PICTURE_REASONS else len(rows)
            if reason in FIXES and (is_excess(count, len(rows), allowed) or surely_more(count, of, allowed)):
                break
        else:
            if len(skipped) <= max(NEARLY_ALL, allowed) * len(rows):
                continue
            reason, count, of = *counts[0], len(rows)
        enough = max(share(len(skipped), len(rows)), share(count, of))
        raise KdcliError(
            f"part {part.spec.part!r}: of {len(rows)} checked rows, {len(skipped)} are skipped: "
            f"{told(reason, skipped, part)}. Nothing is captured; --allow-skips {enough:g} would allow it (now {allowed:g})"
        )


def look_at(row: object, part: Part, preparer: Preparer) -> SkipRecord | None:
    """Why a row is not used; None where it is."""
    if isinstance(row, SkipRecord):
        return row
    try:
        preparer.prepare(row, part.spec.template, part.spec.max_image_pixels)  # type: ignore[arg-type]
    except SkipSample as skip:
        return skip_record(row, skip)  # type: ignore[arg-type]
    return None


def is_excess(skipped: int, rows: int, allowed: float) -> bool:
    """Whether more than ``allowed`` of such rows cannot be used. Of few rows a few more are let pass, but never all."""
    return skipped > allowed * rows and (skipped == rows or surely_more(skipped, rows, allowed))


def surely_more(skipped: int, rows: int, allowed: float) -> bool:
    """The same, where chance does not explain it: P(X ≥ k) ≤ exp(−n·KL(k/n ‖ p)) (Chernoff)."""
    if skipped <= allowed * rows or not allowed:
        return skipped > allowed * rows
    seen = skipped / rows
    used = (1 - seen) * log((1 - seen) / (1 - allowed)) if seen < 1 else 0.0
    return rows * (seen * log(seen / allowed) + used) > log(1 / DOUBT)


def told(reason: str, skipped: Sequence[SkipRecord], part: Part) -> str:
    """How many are skipped for a reason, with an example and the fix."""
    alike = [one for one in skipped if one.reason == reason]
    root = part.spec.image_root if part.spec.image_root is not None else "not given: the folder of the data"
    fix = {**FIXES, UNREAD: OF_TEXT}.get(reason, "`kdcli doctor` lists them all").format(root=root)
    return f"{len(alike)} by {reason} ({alike[0].place}: {alike[0].detail}): {fix}"


def share(part: int, whole: int) -> float:
    """Upwards to a hundredth, so that as many are allowed."""
    return -(-100 * part // whole) / 100


def excess(cache: TeacherCache, columns: Sequence[str], allowed: float, of_teacher: bool = False) -> list[str]:
    """A line for every part of which more rows than ``allowed`` (a share) were skipped, of its first column where this is so.

    Args:
        of_teacher: only those count that the teacher had no finite answer for.
    """
    lines: dict[str, str] = {}
    for column in columns:
        done = set(committed_shards(cache.storage, column))
        for part in cache.plan.parts:
            name = part.spec.part
            commits = read_commits(cache.storage, column, sorted(done & set(cache.shards([name]))))
            rows = sum(one.rows for one in commits)
            skipped = [skip for one in commits for skip in one.skipped if not of_teacher or skip.reason == OF_TEACHER]
            skipped = [skip for skip in skipped if skip.reason != UNREAD]
            if name not in lines and is_excess(len(skipped), rows, allowed):
                why = told(Counter(one.reason for one in skipped).most_common(1)[0][0], skipped, part)
                lines[name] = (
                    f"part {name!r}: {len(skipped)} of {rows} rows are skipped in {column}, {why}; "
                    f"--allow-skips {share(len(skipped), rows):g} takes that ({allowed:g} is allowed)"
                )
    return list(lines.values())


def take_in_again(
    job: CaptureJob,
    shards: Sequence[int],
    reader_of: Callable[[int], SampleReader],
    preparer: Preparer,
    run: Callable[[CaptureJob, dict[int, list[str]]], None],
) -> list[str]:
    """Make those of the shards again that skip rows which can be used now: a new attempt of ``samples`` and every field of the job.

    A kill between two columns leaves the one with rows that the other still skips: run again, it is made again alone. Returns notes.

    Args:
        run: captures these columns of these shards.
    """
    again = usable_again(job, shards, reader_of, preparer)
    if not again:
        return ["no row that was skipped can be used now"] if shards else []

    def skips() -> int:
        return sum(len(read_commit(job.storage, "samples", shard).skipped) for shard in again)

    before = skips()
    run(replace(job, writer=ShardReplacer, keep_rows=True), again)
    made = f"{len(again)} shard{'s' * (len(again) != 1)} made again"
    said = f"{before - skips()} rows added, {made}; `kdcli cache gc --yes` removes the replaced files"
    return [said, *others_left(job, again)]


def usable_again(
    job: CaptureJob, shards: Sequence[int], reader_of: Callable[[int], SampleReader], preparer: Preparer
) -> dict[int, list[str]]:
    """Shards, with their columns, that skip a row which can be used now. Each is read up to the first such row.

    What the teacher itself made of a row (``nonfinite_teacher``) it would make again.
    """
    found = {}
    for shard in shards:
        skips = {column: _skips(job, column, shard) for column in job.columns(shard)}
        wanted = frozenset().union(*skips.values())
        columns: list[str] = []
        for ordinal in _usable(job, shard, wanted, reader_of(shard), preparer) if wanted else ():
            columns = [column for column, ordinals in skips.items() if ordinal in ordinals or column in columns]
            if len(columns) == sum(map(bool, skips.values())):
                break
        if columns:
            found[shard] = columns
    return found


def _skips(job: CaptureJob, column: str, shard: int) -> frozenset[int]:
    try:
        commit = read_commit(job.storage, column, shard)
    except CacheError:
        return frozenset()
    return frozenset(skip.ordinal for skip in commit.skipped if skip.reason != OF_TEACHER)


def _usable(
    job: CaptureJob, shard: int, wanted: frozenset[int], reader: SampleReader, preparer: Preparer
) -> Iterator[int]:
    """Ordinals of these rows that can be used now."""
    part = next(part for part in job.plan.parts if part.spec.part == job.plan.slices[shard].part)
    for group in job.plan.slices[shard].groups:
        if wanted.isdisjoint(range(group.start, group.start + group.rows)):
            continue
        for row in reader.read(group):
            if row.ordinal in wanted and look_at(row, part, preparer) is None:
                yield row.ordinal


def others_left(job: CaptureJob, shards: Mapping[int, Sequence[str]]) -> list[str]:
    """A note where the cache has fields that this command does not make, and that go on without the rows taken in."""
    others = sorted(set(job.storage.names("fields")) - set(job.fields))
    others = [name for name in others if set(shards) & set(committed_shards(job.storage, f"fields/{name}"))]
    if not others:
        return []
    return [f"{', '.join(others)}: without the rows taken in; name them with --fields and --retry-skipped, too"]
