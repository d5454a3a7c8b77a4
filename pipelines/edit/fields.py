"""``kdcli cache add-field | drop-field``: fields of an existing cache, without touching anything else of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from pipelines.capture.cache_teacher import adopted, capture_fields
from pipelines.capture.executors import local
from pipelines.capture.presence import at_work
from pipelines.capture.profiles import refuse_fields_of_images, with_tails
from pipelines.capture.worker import CaptureRequest, make_preparer
from pipelines.settings import CaptureSettings
from teacher_cache.errors import CacheError, CompatibilityError, KdcliError
from teacher_cache.fields import Field, create_field, wants_of
from teacher_cache.planning.plan import difference
from teacher_cache.planning.plan_file import read_plan
from teacher_cache.preparing.fingerprint import preparation_version
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.shards.commit import committed_shards
from teacher_cache.shards.storage import Storage
from teacher_cache.teachers.backends import load_processor, refuse_wants, teacher_fingerprint
from teacher_cache.teachers.transformers import TeacherSpec, resolve_device


def add_fields(
    url: str,
    teacher: TeacherSpec,
    params: Mapping[str, Mapping[str, Any]],
    settings: CaptureSettings,
    other_teacher: bool = False,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> dict[str, Any]:
    """Capture further fields of a cache from its own ``samples``; continues where an earlier run stopped.

    Args:
        params: field → its parameters, in writing order.
        settings: ``workers``, ``batch_tokens``, ``parts_without_fields``, ``calibration_rows`` and ``calibration`` count;
            the rest is the cache's.
        other_teacher: the fields may come from another teacher than the existing ones, over the same vocabulary.

    Returns:
        ``inspect_cache.status`` of the cache.
    """
    cache = TeacherCache(url)
    fields = {name: create_field(name, values) for name, values in with_tails(params, teacher).items()}
    refuse_other_params(cache, fields)
    check_parts(cache, settings.parts_without_fields)
    spec = as_described(cache, teacher, other_teacher)
    preparation = cache.plan.preparation
    own = {"max_length": preparation["max_length"], "over_length": preparation["over_length"]}
    settings = replace(settings, fields=tuple(fields), **own)
    version = preparation_version(preparation, cache.storage)
    request = CaptureRequest(spec, (), url, settings, params, from_samples=True, version=version)
    refuse_wants(spec, wants_of(fields.values()))
    processor, config = load_processor(spec)
    if processor.image_processor is None:
        refuse_fields_of_images(fields)
    check_preparation(cache, spec, make_preparer(request, processor, config).fingerprint())
    local.worker_count(settings.workers)
    resolve_device(spec)
    fingerprint = teacher_fingerprint(spec, processor, config)
    check_teacher(cache, spec, fingerprint, other_teacher, tuple(fields))
    adoption = adopted(request, cache.storage, fields, fingerprint)
    with at_work(cache.storage, "cache add-field"):
        return capture_fields(request, cache.plan, fields, fingerprint, (processor, config), adoption, progress)


def refuse_other_params(cache: TeacherCache, fields: Mapping[str, Field]) -> None:
    """CacheError with a diff and the fix where a field is there with other parameters or in another version."""
    for name, one in fields.items():
        if name not in cache.fields:
            continue
        there = {key: cache.fields[name][key] for key in ("version", "params")}
        here = {"version": one.version, "params": dict(one.params)}
        if there != here:
            lines = "; ".join(difference(there, here))
            raise CacheError(
                f"{cache.storage}: field {name} exists with other parameters: {lines}: give the same ones to continue it, "
                f"or first `kdcli cache drop-field {cache.storage} {name}`"
            )


def check_parts(cache: TeacherCache, without: tuple[str, ...]) -> None:
    """CacheError where a part is unknown, or where rows of one that gets fields are not in ``samples`` yet."""
    unknown = sorted(set(without) - set(cache.parts()))
    if unknown:
        raise CacheError(
            f"{cache.storage}: parts_without_fields names {', '.join(unknown)}, but the parts are {', '.join(cache.parts())}"
        )
    shards = set(cache.shards([part for part in cache.parts() if part not in without]))
    missing = shards - set(committed_shards(cache.storage, "samples"))
    if missing:
        raise CacheError(
            f"{cache.storage}: samples has {len(shards) - len(missing)} of {len(shards)} shards, and fields are added from "
            f"samples: first finish it, with the same `{cache.made_by()}` command as before"
        )


def as_described(cache: TeacherCache, spec: TeacherSpec, other_teacher: bool) -> TeacherSpec:
    """``spec`` whose dtype, where none was asked for, is that of the existing fields: of the same teacher, another machine's
    default would be another teacher."""
    dtypes = {body["teacher"].get("dtype", "auto") for body in cache.fields.values()}
    return (
        replace(spec, dtype=dtypes.pop()) if spec.dtype == "auto" and len(dtypes) == 1 and not other_teacher else spec
    )


def check_preparation(cache: TeacherCache, spec: TeacherSpec, here: Mapping[str, Any]) -> None:
    """CompatibilityError where this teacher reads rows as other tokens or pixels than those of ``samples``."""
    lines = difference(cache.plan.preparation, here, "preparation")
    if lines:
        raise CompatibilityError(
            f"{cache.storage}: teacher {spec.id!r} prepares rows differently from this cache: {'; '.join(lines)}: "
            "give --teacher a model with the same processor, or make a new cache with `kdcli cache-teacher`"
        )


def check_teacher(
    cache: TeacherCache, spec: TeacherSpec, here: Mapping[str, Any], other_teacher: bool, adding: tuple[str, ...]
) -> None:
    """CompatibilityError where the cache's fields were made by another teacher; with ``other_teacher`` only where a field that is
    to be continued was. That both have one vocabulary is part of ``check_preparation``."""
    there = {name: body["teacher"] for name, body in cache.fields.items()}
    for name in adding:
        if there.get(name, here) != here:
            lines = "; ".join(difference(there[name], here, "teacher"))
            raise CompatibilityError(
                f"{cache.storage}: field {name} exists, made by another teacher than {spec.id!r}: {lines}: continue it with its own "
                f"teacher, or first `kdcli cache drop-field {cache.storage} {name}`"
            )
    if not there or here in there.values() or other_teacher:
        return
    name, teacher = next(iter(there.items()))
    lines = "; ".join(difference(teacher, here, "teacher"))
    raise CompatibilityError(
        f"{cache.storage}: field {name} was made by another teacher than {spec.id!r}: {lines}: "
        "give the original --teacher and --dtype, or --other-teacher for fields of two teachers"
    )


@dataclass(frozen=True)
class Dropped:
    """What ``drop_field`` removes or removed."""

    name: str
    shards: int
    files: int
    bytes: int


def drop_field(url: str, name: str, remove: bool) -> Dropped:
    """Remove a field's folder, or only say what would go; CacheError listing the fields where it has no such one.

    A kill leaves a field of fewer shards, never one whose commits name what is gone, and the same command finishes the work:
    commits go first, the description last. The cache itself is not opened: a damaged description is no obstacle. A capture that is
    at work is.
    """
    storage = Storage(url)
    read_plan(storage)
    with at_work(storage, "cache drop-field", alone=True) if remove else nullcontext():
        return _drop_field(storage, name, remove)


def _drop_field(storage: Storage, name: str, remove: bool) -> Dropped:
    folder = f"fields/{name}"
    choices = [one for one in storage.names("fields") if not one.startswith(".") and storage.files(f"fields/{one}")]
    if name not in choices:
        raise CacheError(f"{storage}: no field {name}; it has {', '.join(choices) or 'none'}")
    files = storage.files(folder)
    folders = {file.rpartition("/")[0] for file in files}
    size = sum(count for one in folders for count in storage.sizes(one).values())
    found = Dropped(name, len(committed_shards(storage, folder)), len(files), size)
    if remove:
        for file in sorted(files, key=lambda file: removal_rank(folder, file)):
            storage.remove(file)
        storage.remove_empty_folders(folder)
    return found


def removal_rank(folder: str, file: str) -> int:
    """Commits, then what they name, then the description that says which field it was."""
    if file.startswith(f"{folder}/commits/"):
        return 0
    return 2 if file == f"{folder}/field.json" else 1


def parse_field_sets(names: tuple[str, ...], given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """``{"k": 8}`` or ``{"vision_topk.k": 8}`` → field → parameters; KdcliError where it is not clear whose a value is."""
    params: dict[str, dict[str, Any]] = {name: {} for name in names}
    for key, value in given.items():
        name, dot, parameter = key.rpartition(".")
        if not dot and len(names) > 1:
            raise KdcliError(f"--set {key}=…: of which field? Write --set {names[0]}.{key}=…")
        if dot and name not in params:
            raise KdcliError(f"--set {key}=…: {name} is not among the fields to add: {', '.join(names)}")
        params[name or names[0]][parameter] = value
    return params
