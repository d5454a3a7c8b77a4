"""``kdcli cache-teacher``: plan, describe, capture every shard that is not committed yet, report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from pipelines.capture import receipt
from pipelines.capture.adopt_calibration import calibrations
from pipelines.capture.describe import as_begun, describe, new_calibrated
from pipelines.capture.executors import local
from pipelines.capture.fit_fields import ask_canaries, fit_fields
from pipelines.capture.heartbeat import forget
from pipelines.capture.label_warnings import label_warnings
from pipelines.capture.presence import at_work
from pipelines.capture.profiles import chosen_fields, with_tails
from pipelines.capture.skipped_samples import excess, refuse_skips, take_in_again, unread_images
from pipelines.capture.worker import CaptureRequest, make_preparer, run_shards, sample_readers
from pipelines.inspect.cache import status
from teacher_cache.capturing.capture_job import CaptureJob
from teacher_cache.errors import CacheError, KdcliError, naming_full_disk
from teacher_cache.fields import Field, create_field, wants_of
from teacher_cache.fields.calibration import Calibration
from teacher_cache.models.text_vision import check_layers
from teacher_cache.planning.make_plan import make_plan
from teacher_cache.planning.plan import Plan, parts_with_images
from teacher_cache.planning.plan_file import known_plan, read_plan, write_plan
from teacher_cache.planning.same_samples import bind_pictures, refuse_other_pictures
from teacher_cache.preparing.fingerprint import preparation_version
from teacher_cache.preparing.layout import typical_tokens
from teacher_cache.preparing.prepare import Preparer
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.shards.commit import await_listed
from teacher_cache.shards.mender import ShardMender
from teacher_cache.shards.storage import Storage
from teacher_cache.teachers import null
from teacher_cache.teachers.backends import (
    load_head,
    load_processor,
    refuse_wants,
    teacher_fingerprint,
    teacher_reads_images,
)
from teacher_cache.teachers.transformers import resolve_device


def capture(
    request: CaptureRequest,
    progress: Callable[[str, int, int], None] = lambda *_: None,
    warn: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Run the whole job; continues what is there. ``progress(event, done_rows, all_rows)`` is called often, ``warn(line)`` before any
    GPU is touched, with what is among the ``notes`` too.

    Returns:
        ``inspect_cache.status`` of the finished cache: rows, skips by reason, bytes by column; ``notes`` where there are any; ``excess``
        where more rows of a part were skipped than ``allow_skips``: a line each, which a command ends with.

    Raises:
        KdcliError: before anything is written, where so many rows of a part cannot be used.
    """
    storage = Storage(request.out)
    images = teacher_reads_images(request.teacher)
    wanted = chosen_fields(request.settings.store, request.settings.fields, request.field_params, images)
    fields = {name: create_field(name, params) for name, params in with_tails(wanted, request.teacher).items()}
    fields = as_begun(storage, fields, wanted)
    job = receipt.Job(request.out, request.teacher, request.data, request.settings, fields)
    files = job.files()
    if not request.retry_skipped and job.is_finished(files):
        forget(storage)  # a run that was killed behind its last commit
        progress("end", *[sum(one.rows for one in read_plan(storage).slices)] * 2)
        return summary_of(request, fields, made_up(request, fields), complete=True)
    request, preparer = prepared_request(request, storage, fields)
    processor, config = preparer.processor, preparer.config
    fingerprint = teacher_fingerprint(request.teacher, processor, config)
    plan = plan_for(request, storage, preparer, config)
    for part in parts_with_images(plan.slices):
        preparer.check_images(part, plan.spec(part).template)
    if storage.exists("manifest.json"):
        write_plan(storage, plan)  # nothing is written: another plan is refused before its rows are looked at
    complete = not missing_of(request, storage, plan, fields)  # or only files of committed shards are
    plan = bind_pictures(storage, plan, complete)
    if not complete or request.retry_skipped:
        refuse_skips(plan, preparer, request.settings.allow_skips)
    preflight, taken = adopted(request, storage, fields, fingerprint)
    said = [] if complete else label_warnings(request.teacher, preparer, plan)
    warnings = [f"WARNING: {line}" for line in [*unread_images(plan, preparer), *said]]
    for line in warnings:
        warn(line)
    # The first write: what can be refused is refused above.
    with naming_full_disk(storage), at_work(storage, "cache-teacher"):
        write_plan(storage, plan)
        refuse_other_pictures(storage, read_plan(storage), plan, complete)  # another writer may have been first
        request = replace(request, seen=files)
        summary = capture_fields(request, plan, fields, fingerprint, (processor, config), (preflight, taken), progress)
    job.remember(files)
    return summary | ({"notes": [*warnings, *summary.get("notes", [])]} if warnings else {})


def prepared_request(
    request: CaptureRequest, storage: Storage, fields: Mapping[str, Field]
) -> tuple[CaptureRequest, Preparer]:
    """(the request with the preparation version of an existing cache, what prepares its rows).

    Refuses what needs no row to be refused.
    """
    refuse_wants(request.teacher, wants_of(fields.values()))
    processor, config = load_processor(request.teacher)
    parts = [spec.part for spec in request.data]
    if unknown := set(request.settings.parts_without_fields) - set(parts):
        raise KdcliError(
            f"parts_without_fields names {', '.join(sorted(unknown))}, but the parts are {', '.join(parts)}"
        )
    if known := known_plan(storage):  # what an older kdcli began is finished as it was begun
        request = replace(request, version=preparation_version(known.preparation, storage))
    preparer = make_preparer(request, processor, config)
    for template in sorted({spec.template for spec in request.data}):
        preparer.check_template(template)
    local.worker_count(request.settings.workers)
    resolve_device(request.teacher)
    return request, preparer


def capture_fields(
    request: CaptureRequest,
    plan: Plan,
    fields: Mapping[str, Field],
    fingerprint: dict[str, Any],
    loaded: tuple[Any, Any],
    adoption: tuple[TeacherCache | None, Mapping[str, Calibration]],
    progress: Callable[[str, int, int], None],
) -> dict[str, Any]:
    """Describe the fields, then capture every shard that is not committed yet. Returns what ``capture`` does.

    Args:
        loaded: the teacher's (processor, config). adoption: as ``adopted`` found it.
    """
    check_layers(wants_of(fields.values()), loaded[1], request.teacher.trust_remote_code)
    storage, (preflight, taken) = Storage(request.out), adoption
    with naming_full_disk(storage):
        hashes, bound = describe(
            storage,
            plan,
            fields,
            fingerprint,
            loaded[0],
            load_head=lambda: load_head(request.teacher, *loaded),
            calibrate=lambda new: taken or fit_fields(request, storage, plan, loaded, new),
        )
        job = CaptureJob(
            storage=storage,
            plan=plan,
            fields=hashes,
            field_objects=bound,
            parts_without_fields=frozenset(request.settings.parts_without_fields),
            batch_tokens=request.settings.batch_tokens,
            staging_bytes=int(request.settings.staging_gb * 1e9),
        )
        missing, gone = job.missing(), lost_columns(job)
        left = request.mine(missing)
        total = sum(one.rows for one in plan.slices)
        done = total - sum(plan.slices[shard].rows for shard in missing)
        progress("start", done, total)
        asking = bool(request.mine(missing | gone) and fields and preflight)
        notes = ask_canaries(request, preflight, storage, fingerprint) if asking and preflight else []
        notes += made_up(request, fields)
        if again := request.mine(gone):
            notes.append(make_lost_again(request, job, again, progress))
            gone = lost_columns(job)
        if left:
            notes += run_shards(request, job, left, done, total, progress)
        await_listed(storage, left, fields)
        if left:
            missing = job.missing()
        if request.retry_skipped:
            notes += retry_skipped(request, job, loaded, progress)
        if not missing and not gone:
            forget(storage)  # of killed runs too: nobody works here any more
        progress("end", total - sum(plan.slices[shard].rows for shard in missing), total)
        return summary_of(request, fields, notes, complete=not missing and not gone)


def lost_columns(job: CaptureJob) -> dict[int, list[str]]:
    """Shards with columns of which a file is gone, though they are committed."""
    return {shard: list(columns) for shard, columns in job.lost().items()}


def make_lost_again(
    request: CaptureRequest,
    job: CaptureJob,
    again: dict[int, list[str]],
    progress: Callable[[str, int, int], None],
) -> str:
    """Capture shards again of which files are gone; they are taken where they are what the commits promise. Returns a note.

    Raises:
        CacheError: naming a file that is still gone.
    """
    total = sum(job.plan.slices[shard].rows for shard in again)
    run_shards(request, replace(job, writer=ShardMender), again, 0, total, progress)
    still = {shard: whats for shard, whats in job.lost().items() if shard in again}
    for whats in still.values():
        raise CacheError(
            f"{job.storage}: {next(iter(whats.values()))}; capturing it again here gives other bytes: accept them with "
            "`kdcli cache repair --replace` and the flags of the capture"
        )
    return f"{len(again)} committed shard{'s' * (len(again) != 1)} had lost files and {'were' if len(again) != 1 else 'was'} made again"


def summary_of(
    request: CaptureRequest, fields: Mapping[str, Field], notes: list[str], complete: bool
) -> dict[str, Any]:
    """What ``capture`` returns. Skips are judged when all shards are there: of a job that several share, by the last."""
    cache = TeacherCache(request.out)
    columns = ["samples", *(f"fields/{name}" for name in fields)]
    settings = request.settings  # a field that is added counts the teacher's skips alone: the others are its samples'
    much = excess(cache, columns, settings.allow_skips, of_teacher=request.from_samples) if complete else []
    much += ["the cache is kept; --retry-skipped adds rows whose cause is gone"] if much else []
    return status(cache) | ({"notes": notes} if notes else {}) | ({"excess": much} if much else {})


def retry_skipped(
    request: CaptureRequest, job: CaptureJob, loaded: tuple[Any, Any], progress: Callable[[str, int, int], None]
) -> list[str]:
    """Take in rows that can be used now. Returns notes."""

    def run(job: CaptureJob, again: dict[int, list[str]]) -> None:
        total = sum(job.plan.slices[shard].rows for shard in again)
        progress("start", 0, total)
        run_shards(request, job, again, 0, total, progress)

    mine = request.mine({shard: [] for shard in range(len(job.plan.slices))})
    return take_in_again(
        job, list(mine), sample_readers(request, job.storage, job.plan), make_preparer(request, *loaded), run
    )


def made_up(request: CaptureRequest, fields: Mapping[str, Field]) -> list[str]:
    """The note on a teacher that says nothing."""
    return [null.NOTE] if fields and request.teacher.id.startswith(null.PREFIX) else []


def adopted(
    request: CaptureRequest, storage: Storage, fields: Mapping[str, Field], fingerprint: Mapping[str, Any]
) -> tuple[TeacherCache | None, dict[str, Calibration]]:
    """(the preflight's cache where one is named, calibrations out of it for the fields that the job's cache lacks)."""
    if not request.settings.calibration:
        return None, {}
    preflight = TeacherCache(request.settings.calibration)
    return preflight, calibrations(preflight, new_calibrated(storage, fields), fingerprint)


def plan_for(request: CaptureRequest, storage: Storage, preparer: Preparer, config: Any) -> Plan:
    """The plan that these flags mean: a changed mixture, template or tokenizer does not pass for that of the existing cache."""
    settings, known = request.settings, known_plan(storage)
    tokens = typical_tokens(config, preparer.processor)
    return make_plan(request.data, settings.shards, preparer.fingerprint(), settings.seed, tokens, known)


def missing_of(
    request: CaptureRequest, storage: Storage, plan: Plan, fields: Mapping[str, Field]
) -> dict[int, list[str]]:
    """Shards with columns that are not committed, before any field is described."""
    bare = frozenset(request.settings.parts_without_fields)
    return CaptureJob(storage, plan, dict.fromkeys(fields, ""), fields, bare).missing()
