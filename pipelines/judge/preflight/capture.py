"""The sampled rows, captured as the real job would: the same fields, the same line of code; held-out rows calibrate nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from pipelines.capture.calibrate import calibrate
from pipelines.capture.describe import describe
from pipelines.capture.profiles import chosen_fields
from pipelines.capture.worker import CaptureRequest, ShardTask
from pipelines.judge.preflight.live import LiveTeacher
from pipelines.judge.preflight.request import PreflightRequest
from pipelines.judge.preflight.sample import without_held_out
from pipelines.processes.memory import give_back
from teacher_cache.capturing.capture_job import CaptureJob
from teacher_cache.fields import CalibratedField, create_field
from teacher_cache.fields.calibration import Calibration
from teacher_cache.planning.plan import Plan
from teacher_cache.preparing.prepare import Preparer
from teacher_cache.shards.commit import await_listed
from teacher_cache.shards.storage import Storage
from teacher_cache.teachers.backends import release


def capture_sample(
    request: PreflightRequest,
    plan: Plan,
    preparer: Preparer,
    live: LiveTeacher,
    fingerprint: dict[str, Any],
    params: Mapping[str, Mapping[str, Any]],
    fitted: Mapping[str, Calibration],
    progress: Callable[[int, int], None],
) -> float | None:
    """Describe and capture what is not there yet.

    Args:
        params: chosen ones, over the profile's. fitted: calibrations of fields that need not be fitted again.
    Returns:
        Seconds that the shards took, without loading the teacher; None where one was there already.
    """
    settings = request.settings.capture
    storage = Storage(request.cache_url)
    wanted = chosen_fields(settings.store, settings.fields, params, request.images)
    fields = {name: create_field(name, values) for name, values in wanted.items()}
    bare = frozenset(settings.parts_without_fields)

    def fit(new: Mapping[str, CalibratedField]) -> Mapping[str, Calibration]:
        left = {name: one for name, one in new.items() if name not in fitted}
        rows, tokens = sum(part.rows for part in plan.parts), settings.batch_tokens
        made = (
            calibrate(left, without_held_out(plan), preparer, live.model, live.head, rows, tokens, bare) if left else {}
        )
        return {**fitted, **made}

    hashes, fields = describe(storage, plan, fields, fingerprint, live.processor, lambda: live.head, fit)
    job = CaptureJob(storage, plan, hashes, fields, bare, settings.batch_tokens)
    left = job.missing()
    live.release()  # the task loads its own, as every worker does
    if not left:
        return None
    fresh = len(left) == len(plan.slices)
    task = ShardTask(CaptureRequest(request.teacher, request.data, request.cache_url, settings, params), job, left)(0)
    started = time.perf_counter()
    for done, shard in enumerate(sorted(left)):
        progress(done, len(left))
        task(shard)
    seconds = time.perf_counter() - started
    await_listed(storage, left, fields)
    del task  # with its teacher: what comes next is the student's
    release()
    give_back()
    return seconds if fresh else None
