"""``kdcli cache repair``: what ``cache verify`` finds damaged is made again, and nothing else; the cache is byte by byte what it was.

From the inside out: the manifest from the mixture; shards of ``samples`` from the mixture; descriptions, heads and calibrations from the
teacher; shards of fields from ``samples`` by the teacher, as ``add-field`` makes them. Nothing is removed first, and nothing is replaced by
bytes that are not proven to be what stood there (``restore``, ``shards/mender``): a repair that dies is run again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from pipelines.capture.cache_teacher import adopted, plan_for
from pipelines.capture.fit_fields import ask_canaries
from pipelines.capture.heartbeat import forget
from pipelines.capture.presence import at_work
from pipelines.capture.profiles import chosen_fields
from pipelines.capture.worker import CaptureRequest, make_preparer, run_shards
from pipelines.edit.fields import as_described, check_preparation
from pipelines.edit.restore import Descriptions
from pipelines.edit.restore_manifest import LoadedTeacher, restore_manifest
from pipelines.inspect.cache import check_descriptions, hashes, refuse_no_cache, survey
from pipelines.settings import CaptureSettings
from teacher_cache.capturing.capture_job import CaptureJob
from teacher_cache.errors import FULL, CacheError, CompatibilityError, KdcliError, naming_full_disk
from teacher_cache.planning.plan import Plan, difference
from teacher_cache.planning.same_samples import refuse_other_pictures, with_pictures
from teacher_cache.preparing.fingerprint import preparation_version
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.reading.verify import Problem, shard_problems
from teacher_cache.shards.mender import ShardMender, ShardReplacer
from teacher_cache.shards.storage import Storage
from teacher_cache.sources import DataSpec
from teacher_cache.teachers.backends import load_processor, teacher_fingerprint
from teacher_cache.teachers.transformers import TeacherSpec

Progress = Callable[[str, int, int], None]
Place = tuple[str, int | None]
NO_WAY = "what the teacher and these flags make cannot be proven to equal the original"
OTHER_BYTES = (
    "made again here it is other bytes: same machine kind, library versions and --batch-tokens as in the capture? "
    "--replace takes the new ones"
)


@dataclass(frozen=True)
class RepairRequest:
    """One repair as the user asked for it.

    Attributes:
        teacher: that made the damaged fields; None: nothing is repaired. data: the mixture; empty: where the manifest says it is.
        settings: as in the capture; what the manifest says, it says better.
        params: field → parameters, for those whose ``field.json`` is damaged; the profile's and ``fields``' where they are not named.
        replace: take shards whose bytes are not those that stood there.
    """

    url: str
    teacher: TeacherSpec | None
    data: tuple[DataSpec, ...]
    settings: CaptureSettings
    params: Mapping[str, Mapping[str, Any]]
    replace: bool = False


def repair(request: RepairRequest, dry_run: bool = False, progress: Progress = lambda *_: None) -> dict[str, Any]:
    """Find and mend. Returns ``{"cache", "problems", "left", "notes"}``: what was found; of that, what is still so, with a reason each.

    Args:
        dry_run: only find. ``left`` is then all of it, without reasons.
    """
    if dry_run:
        _, found = survey(request.url)
        left = [as_json(one) | {"how": how(one)} for one in found]
        return {"cache": request.url, "problems": list(map(as_json, found)), "left": left, "notes": []}
    refuse_no_cache(storage := Storage(request.url))
    with at_work(storage, "cache repair", alone=True):
        return mend(request, progress)


def mend(request: RepairRequest, progress: Progress) -> dict[str, Any]:
    """``repair`` of a cache in which nobody else is at work."""
    cache, found = survey(request.url)
    result: dict[str, Any] = {"cache": request.url, "problems": list(map(as_json, found)), "left": [], "notes": []}
    if found and request.teacher is None:
        raise KdcliError(f"{len(found)} problems: give the cache's teacher with --teacher to repair them")
    if cache is None:
        lost = plan_request(request, None)
        restore_manifest(lost, load_teacher(lost.teacher))
        cache, found = survey(request.url)
        assert cache is not None
        result["problems"] += map(as_json, found)
    if found:
        repairing = Repairing(request, cache, progress)
        with naming_full_disk(cache.storage):
            repairing.run(found)
        result["left"] = [as_json(one) | {"why": why} for one, why in repairing.left(found)]
        result["notes"] = repairing.notes
    if not result["left"]:
        forget(cache.storage)  # words of repairs that died
    return result


def broken_shards(found: Sequence[Problem]) -> list[tuple[str, int]]:
    """(column, shard), each once."""
    return list(dict.fromkeys((one.column, one.shard) for one in found if one.shard is not None))


def as_json(problem: Problem) -> dict[str, Any]:
    return {"column": problem.column, "shard": problem.shard, "what": problem.what}


def how(problem: Problem) -> str:
    """What a repair makes a damaged place from."""
    if problem.column == "manifest.json":
        return "planned again from the mixture, with the flags of the capture; then the rest is checked"
    if problem.shard is None:
        return "made again by the teacher, with the flags of the capture"
    return "made again from the mixture" if problem.column == "samples" else "made again from samples, by the teacher"


def load_teacher(spec: TeacherSpec) -> LoadedTeacher:
    processor, config = load_processor(spec)
    return LoadedTeacher(processor, config, teacher_fingerprint(spec, processor, config))


def plan_request(request: RepairRequest, plan: Plan | None) -> CaptureRequest:
    """The capture that made ``samples``: as ``plan`` says where there is one, else as the flags do."""
    assert request.teacher is not None
    if plan is None:
        if not request.data:
            raise KdcliError(
                f"{request.url}/manifest.json is made again from the mixture: give --data … as in the capture"
            )
        return CaptureRequest(request.teacher, request.data, request.url, request.settings, {})
    data = request.data or tuple(part.spec for part in plan.parts)
    settings = replace(plan_settings(request.settings, plan), shards=len(plan.slices), seed=plan.seed)
    version = preparation_version(plan.preparation, request.url)
    return CaptureRequest(request.teacher, data, request.url, settings, {}, version=version)


def plan_settings(settings: CaptureSettings, plan: Plan) -> CaptureSettings:
    """The limits of the plan itself."""
    return replace(settings, max_length=plan.preparation["max_length"], over_length=plan.preparation["over_length"])


class Repairing:
    """One repair of a cache whose manifest can be read."""

    def __init__(self, request: RepairRequest, cache: TeacherCache, progress: Progress):
        assert request.teacher is not None
        self.request, self.cache, self.progress = request, cache, progress
        self.spec = as_described(cache, request.teacher, other_teacher=False)
        self.storage: Storage = cache.storage
        self.reasons: dict[Place, str] = {}
        self.notes: list[str] = []
        self.writer = ShardReplacer if request.replace else ShardMender

    @cached_property
    def teacher(self) -> LoadedTeacher:
        return load_teacher(self.spec)

    def run(self, found: Sequence[Problem]) -> None:
        """From the inside out; what cannot be mended gets a reason, and the rest is mended all the same."""
        broken: dict[str, list[int]] = {}
        for column, shard in broken_shards(found):
            broken.setdefault(column, []).append(shard)
        if "samples" in broken:
            self._try([("samples", shard) for shard in broken["samples"]], self._samples, broken["samples"])
        if any(one.shard is None for one in found):
            self._try([(one.column, None) for one in found if one.shard is None], self._descriptions)
            self.cache = TeacherCache(self.request.url, tolerant=True)
        columns = {column: shards for column, shards in broken.items() if column != "samples"}
        if columns:
            self._try([(column, n) for column, shards in columns.items() for n in shards], self._fields, columns)

    def _try(self, places: Sequence[Place], mend: Callable[..., None], *arguments: Any) -> None:
        """Errors that the user can mend (a folder in a file's place) become the reason why these places are left."""
        try:
            mend(*arguments)
        except (KdcliError, OSError) as error:
            if getattr(error, "errno", None) in FULL:
                raise
            for place in places:
                self.reasons.setdefault(place, str(error))

    def _samples(self, shards: Sequence[int]) -> None:
        """From the mixture, which must still make the same plan."""
        if self.cache.plan.derived:
            raise CacheError(
                f"its rows come from other caches: make it again from them with `{self.cache.made_by()}` and another --out"
            )
        capture = plan_request(self.request, self.cache.plan)
        preparer = make_preparer(capture, self.teacher.processor, self.teacher.config)
        plan = plan_for(capture, self.storage, preparer, self.teacher.config)
        if plan.plan_hash != self.cache.plan_hash:
            lines = "; ".join(difference(self.cache.plan.identity(), plan.identity()))
            raise CacheError(
                f"the mixture or the teacher differs from the capture's: {lines}: give the original --data … and --teacher"
            )
        refuse_other_pictures(self.storage, self.cache.plan, with_pictures(plan))
        job = CaptureJob(self.storage, plan, {}, {}, batch_tokens=capture.settings.batch_tokens, writer=self.writer)
        self._redo(replace(capture, teacher=self.spec), job, {shard: ["samples"] for shard in shards})

    def _descriptions(self) -> None:
        Descriptions(
            self.cache,
            self._from_samples(),
            self.teacher,
            wanted_params(self.request, list(self.cache.unreadable)),
            lambda column, why: self.reasons.update({(column, None): why}),
        ).restore()

    def _fields(self, columns: Mapping[str, Sequence[int]]) -> None:
        """From ``samples``, by the teacher that made them."""
        capture, named = self._from_samples(), hashes(self.cache)
        check_preparation(
            self.cache, self.spec, make_preparer(capture, self.teacher.processor, self.teacher.config).fingerprint()
        )
        left: dict[int, list[str]] = {}
        objects = {}
        every = {shard for shards in columns.values() for shard in shards}
        without = {n for n in every if any(shard_problems(self.storage, self.cache.plan, "samples", "", n))}
        for column, shards in columns.items():
            name = column.removeprefix("fields/")
            try:
                objects[name] = self._open_field(name)
            except KdcliError as error:
                self.reasons.update({(column, shard): str(error) for shard in shards})
                continue
            for shard in shards:
                if shard in without:
                    self.reasons[column, shard] = "it is made from samples, and their shard is damaged, too"
                else:
                    left.setdefault(shard, []).append(column)
        if not left:
            return
        if self.request.replace:
            self.notes.append("`kdcli cache gc --yes` removes the shards that were replaced by others")
            preflight, _ = adopted(capture, self.storage, {}, dict(self.teacher.fingerprint))
            if preflight:
                self.notes += ask_canaries(capture, preflight, self.storage, dict(self.teacher.fingerprint))
        bound = {name: named[f"fields/{name}"] for name in objects}
        tokens = capture.settings.batch_tokens
        job = CaptureJob(self.storage, self.cache.plan, bound, objects, batch_tokens=tokens, writer=self.writer)
        self._redo(capture, job, left)

    def _open_field(self, name: str) -> Any:
        if name not in self.cache.fields:
            raise CacheError(f"fields/{name}/field.json cannot be read")
        there, here = self.cache.fields[name]["teacher"], self.teacher.fingerprint
        if there != here:
            lines = "; ".join(difference(there, here, "teacher"))
            raise CompatibilityError(
                f"it was made by another teacher than {self.spec.id!r}: {lines}: repair it with its own teacher"
            )
        return self.cache.open_field(name)

    def _from_samples(self) -> CaptureRequest:
        settings = plan_settings(self.request.settings, self.cache.plan)
        version = preparation_version(self.cache.plan.preparation, self.storage)
        return CaptureRequest(self.spec, (), self.request.url, settings, {}, from_samples=True, version=version)

    def _redo(self, capture: CaptureRequest, job: CaptureJob, left: dict[int, list[str]]) -> None:
        total = sum(job.plan.slices[shard].rows for shard in left)
        self.progress("start", 0, total)
        run_shards(capture, job, left, 0, total, self.progress)

    def left(self, found: Sequence[Problem]) -> list[tuple[Problem, str]]:
        """What is still wrong at these places, each with the reason; read again, nothing is believed."""
        self.cache = TeacherCache(self.request.url, tolerant=True)
        named = hashes(self.cache)
        still = check_descriptions(self.cache)
        for column, shard in broken_shards(found):
            said = shard_problems(self.storage, self.cache.plan, column, named.get(column, ""), shard)
            still += [Problem(column, shard, what) for what in said]
        return [(one, self._reason(one)) for one in still]

    def _reason(self, problem: Problem) -> str:
        if (problem.column, problem.shard) in self.reasons:
            return self.reasons[problem.column, problem.shard]
        field = self.cache.fields.get(problem.column.removeprefix("fields/"))
        folder = field["teacher_folder"] if field else problem.column
        if folder.startswith("teacher/") and folder != self.teacher.folder:
            return f"it is of another teacher than {self.spec.id!r}: repair it with its own teacher"
        return NO_WAY if problem.shard is None else OTHER_BYTES


def wanted_params(request: RepairRequest, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Parameters of fields whose description is lost: those of the profile or of ``fields``, and those that were named for it."""
    settings = request.settings
    captured = chosen_fields(settings.store, settings.fields, {})
    given = {name: values for name, values in request.params.items() if name in captured}
    wanted = chosen_fields(settings.store, settings.fields, given)
    others = {name: dict(values) for name, values in request.params.items() if name not in captured}
    return {name: values for name, values in {**wanted, **others}.items() if name in names}
