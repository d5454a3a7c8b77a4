"""A teacher cache opened for training: which rows it has, and one row with everything a run asked for.

Opening reads the manifest, the field descriptions and the commits only; a shard's index is read when its first row is.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from teacher_cache.codecs import container
from teacher_cache.errors import CacheError
from teacher_cache.fields import Field, open_field
from teacher_cache.models.low_rank import LowRankHead
from teacher_cache.planning.plan_file import read_plan
from teacher_cache.reading.sample_checks import check_head
from teacher_cache.shards.commit import committed_shards
from teacher_cache.shards.disk_cache import DiskCache
from teacher_cache.shards.reader import ColumnReader
from teacher_cache.shards.remote import READ_ONLY
from teacher_cache.shards.schema import COUNT, require
from teacher_cache.shards.sealed import unseal
from teacher_cache.shards.storage import Storage

_FILE = {"path": str, "sha256": str}
_PREPARATION = {"max_length": COUNT, "over_length": str, "version?": COUNT}
_TEACHER = {
    **dict.fromkeys(("head_width", "hidden_size"), COUNT),
    **dict.fromkeys(("dtype", "attn_implementation"), str),
    "tokenizer": {"length": COUNT},
}
_FIELD = {
    "version": int,
    "params": dict,
    "temperatures?": ([float], None),
    "plan_hash": str,
    "teacher": dict,
    "teacher_folder": str,
    "head_sha256": (str, None),
    "calibration?": (_FILE, None),
    "low_rank_head?": (_FILE, None),
}
"""What ``field.json`` holds."""
MOST_FIELDS = 256
MOST_PROCESSOR_FILES = 1000
_NAME = re.compile(r"[a-z][a-z0-9_]*")
"""Of a field. Other files may lie beside these folders."""


class TeacherCache:
    """A cache's description: plan, fields, and the teacher that made each field.

    Args:
        tolerant: fields whose description cannot be read go to ``unreadable``, with the reason, and the others are opened.
    """

    def __init__(self, url: str, tolerant: bool = False):
        self.storage = Storage(url)
        self.plan = read_plan(self.storage)
        require(self.plan.preparation, _PREPARATION, f"{self.storage}/manifest.json: preparation")
        self.plan_hash = self.plan.plan_hash
        self.fields: dict[str, dict[str, Any]] = {}
        self.unreadable: dict[str, str] = {}
        for name in self._folders():
            if name.startswith("."):
                continue
            try:
                if self._is_field(name):
                    self.fields[name] = self._describe(name)
            except CacheError as error:
                if not tolerant:
                    raise
                self.unreadable[name] = str(error)
        self._opened: dict[str, Field] = {}

    def _folders(self) -> list[str]:
        """Names below ``fields``; CacheError where a web server keeps them to itself."""
        if self.storage.scheme not in READ_ONLY:
            if len(names := self.storage.names("fields")) > MOST_FIELDS:
                raise CacheError(f"{self.storage}/fields holds {len(names):,} folders, at most {MOST_FIELDS} are read")
            return names
        advice = (
            "its web server does not list its folders: turn that on, or copy the cache to a disk or an object store"
        )
        try:
            names = self.storage.names("fields")
        except CacheError as error:
            raise CacheError(f"{self.storage}: {advice} ({error})") from None
        if not names and not self.storage.names("samples/commits"):
            raise CacheError(f"{self.storage}: {advice}")
        return names

    def _is_field(self, name: str) -> bool:
        """A folder without description and commits is none: its capture died at the first write, or its removal at the last."""
        if self.storage.local and (os.path.islink(self.storage.path(f"fields/{name}")) or _NAME.fullmatch(name)):
            self.storage.names(f"fields/{name}")  # a folder, and there
        described = self.storage.exists(f"fields/{name}/field.json")
        return described or bool(committed_shards(self.storage, f"fields/{name}"))

    def _describe(self, name: str) -> dict[str, Any]:
        try:
            data = self.storage.read(f"fields/{name}/field.json")
            place = f"{self.storage}/fields/{name}/field.json"
            body = require(unseal(data, place), _FIELD, place)
            if body["teacher"]:  # a cache that no teacher made says so, and no student can be held against it
                require(body["teacher"], _TEACHER, f"{place}: teacher")
            if body["plan_hash"] != self.plan_hash:
                raise CacheError(f"{self.storage}: field {name} belongs to another plan")
        except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
            raise CacheError(f"{self.storage}/fields/{name}/field.json: damaged or missing ({error})") from None
        return body | {"sha256": hashlib.sha256(data).hexdigest()}

    def column(self, name: str, disk: DiskCache | None = None) -> ColumnReader:
        """``samples``, or a field by its name. disk: where tars of an object store are kept."""
        rows = self.plan.slice_rows
        if name == "samples":
            return ColumnReader(self.storage, "samples", self.plan_hash, "", disk, rows)
        if name not in self.fields:
            raise CacheError(f"{self.storage}: no field {name}; it has {', '.join(sorted(self.fields)) or 'none'}")
        return ColumnReader(self.storage, f"fields/{name}", self.plan_hash, self.fields[name]["sha256"], disk, rows)

    def open_field(self, name: str) -> Field:
        """The field as it was written, with its calibration; read once."""
        if name not in self._opened:
            self._opened[name] = read_field(self.storage, name, self.fields[name])
        return self._opened[name]

    def parts(self) -> list[str]:
        return [part.spec.part for part in self.plan.parts]

    def shards(self, parts: Sequence[str]) -> list[int]:
        """Shards of these parts; CacheError listing the parts where one is unknown."""
        unknown = [part for part in parts if part not in self.parts()]
        if unknown:
            raise CacheError(f"{self.storage}: no part {', '.join(unknown)}; it has {', '.join(self.parts())}")
        wanted = set(parts)
        return [number for number, one in enumerate(self.plan.slices) if one.part in wanted]

    def made_by(self) -> str:
        """The command that made this cache, and that finishes it where it is not complete."""
        derived = self.plan.derived
        return f"kdcli cache {derived['by']}" if derived else "kdcli cache-teacher"

    def template(self, part: str) -> str:
        return self.plan.spec(part).template

    def image_limits(self) -> dict[str, int]:
        """Part → most pixels of an image, as the capture had it."""
        return {part.spec.part: part.spec.max_image_pixels for part in self.plan.parts}

    def teacher_head(self, field: str) -> torch.Tensor:
        """The head W ``[V, D]`` of the teacher that made ``field``, checked against the field's own description."""
        body = self.fields[field]
        file = {"path": f"{body['teacher_folder']}/head.safetensors", "sha256": body["head_sha256"]}
        weight = read_tensors(self.storage, file, field).get("weight")
        if weight is None or weight.ndim != 2:
            raise CacheError(f"{self.storage}: {file['path']} is not a head: run `kdcli cache verify`")
        check_head(weight, body["teacher"], body["teacher"].get("hidden_size"), f"{self.storage}: {file['path']}")
        return weight

    def processor_files(self, folder: str) -> dict[str, str]:
        """Files of a teacher's processor (tokenizer, chat template, image settings) → sha256, as their receipt says; empty without one."""
        try:
            return read_receipt(self.storage, f"{folder}/processor.json")
        except FileNotFoundError:
            return {}

    def processor_file(self, folder: str, name: str) -> bytes:
        """Content of one of ``processor_files``; CacheError where it is missing, or not what the receipt says."""
        path = f"{folder}/processor/{name}"
        try:
            data = self.storage.read(path)
        except FileNotFoundError:
            raise CacheError(f"{self.storage}/{path} is missing: `kdcli cache repair` makes it again") from None
        if hashlib.sha256(data).hexdigest() != self.processor_files(folder)[name]:
            raise CacheError(f"{self.storage}/{path} does not have its checksum: `kdcli cache repair` makes it again")
        return data

    def low_rank_head(self, field: str) -> LowRankHead:
        """W′ and b of a sketched field: all that training needs of its teacher."""
        tensors = read_tensors(self.storage, self.fields[field].get("low_rank_head"), field)
        weight, bias = tensors.get("weight"), tensors.get("bias")
        if weight is None or bias is None or weight.ndim != 2 or bias.shape != weight.shape[:1]:
            raise CacheError(
                f"{self.storage}: the low-rank head of field {field} is not a head: run `kdcli cache verify`"
            )
        place = f"{self.storage}: the low-rank head of field {field}"
        opened = self.open_field(field)
        check_head(weight, self.fields[field]["teacher"], getattr(opened, "rank", None), place)
        return LowRankHead(weight, bias, opened.params.get("step"))


def read_receipt(storage: Storage, path: str) -> dict[str, str]:
    """Names of a teacher's files → sha256; FileNotFoundError where there is none, CacheError where it is damaged, or names more than any
    teacher has."""
    found = require(unseal(storage.read(path), f"{storage}/{path}"), {...: str}, f"{storage}/{path}")
    if len(found) > MOST_PROCESSOR_FILES:
        raise CacheError(f"{storage}/{path}: {len(found):,} files, at most {MOST_PROCESSOR_FILES:,} are read")
    return found


def read_field(storage: Storage, name: str, body: Mapping[str, Any]) -> Field:
    """The field that ``field.json`` describes, with its calibration where it has one; CacheError where that cannot be read."""
    file = body.get("calibration")
    calibration = read_tensors(storage, file, name) if file else None
    try:
        field = open_field(name, body, calibration)
    except CacheError as error:
        raise CacheError(f"{storage}/fields/{name}/field.json: {error}") from None
    if field.calibrated and not file:
        raise CacheError(f"{storage}/fields/{name}/field.json names no calibration, field {name} cannot be read")
    return field


def read_tensors(storage: Storage, file: Mapping[str, Any] | None, field: str) -> dict[str, torch.Tensor]:
    """A file that ``field.json`` names by ``path`` and ``sha256``; CacheError where it is not named, missing or another."""
    if file is None:
        raise CacheError(f"{storage}/fields/{field}/field.json does not name a file that field {field} is read with")
    path = file["path"]
    try:
        data = storage.read(path)
    except FileNotFoundError:
        raise CacheError(f"{storage}: {path} is missing, field {field} cannot be read") from None
    if hashlib.sha256(data).hexdigest() != file["sha256"]:
        raise CacheError(f"{storage}: {path} does not have the checksum that field {field} names")
    return container.unpack(data, path)
