"""What describes a cache, made again where it is damaged: manifest, ``field.json``, calibrations, the teacher's head and processor.

Nothing is written that is not proven to be what stood there: commits carry the hash of the plan and of their ``field.json``, and that names
its files by hash. Each file is replaced whole, in one atomic step, after the files that it names.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import product
from typing import Any

from pipelines.capture import canaries
from pipelines.capture.adopt_calibration import calibration_of
from pipelines.capture.describe import (
    HEAD,
    calibration_files,
    field_body,
    field_path,
    processor_files,
    processor_receipt,
    reads_with_head,
)
from pipelines.capture.fit_fields import fit_fields
from pipelines.capture.worker import CaptureRequest
from pipelines.edit.restore_manifest import LoadedTeacher, commits_of, is_named
from pipelines.inspect.cache import receipt, teacher_problems
from teacher_cache.codecs import container
from teacher_cache.errors import KdcliError
from teacher_cache.fields import CalibratedField, Field, create_field
from teacher_cache.fields.calibration import Calibration
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.reading.verify import CALIBRATION_ROLES
from teacher_cache.shards.plain_files import StrangeFile
from teacher_cache.shards.sealed import seal
from teacher_cache.shards.storage import Storage
from teacher_cache.teachers.backends import load_head

Say = Callable[[str, str], None]
"""(column, why it is left as it is)"""


def named_files(body: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Role → calibration file that a ``field.json`` names."""
    return {role: body[role] for role in CALIBRATION_ROLES if body.get(role)}


class Descriptions:
    """The fields of one teacher and what they are read with.

    Args:
        cache: opened tolerantly. request: from its ``samples``; settings as in the capture.
        params: field → its parameters, for those whose description is lost.
    """

    def __init__(
        self, cache: TeacherCache, request: CaptureRequest, teacher: LoadedTeacher, params: Mapping[str, Any], say: Say
    ):
        self.cache, self.storage, self.request, self.teacher, self.say = cache, cache.storage, request, teacher, say
        self.own = {name: body for name, body in cache.fields.items() if body["teacher"] == teacher.fingerprint}
        self.lost = {name: create_field(name, params[name]) for name in cache.unreadable if name in params}
        for name in cache.unreadable.keys() - self.lost.keys():
            say(f"fields/{name}", "which field it was is not known: give --fields and its parameters as in the capture")

    def restore(self) -> None:
        """Everything that can be; the rest is told to ``say``."""
        folder = self.teacher.folder
        problems = [*teacher_problems(self.cache, folder), *canaries.problems(self.storage, folder)]
        if problems and (self.own or self.lost):
            self._processor(folder)
            self._canaries(folder)
        head = self._head(folder)
        for name, one in self.lost.items():
            if not one.calibrated:
                self._describe(name, one, head, [{}])
        self._calibrations(head)

    def _processor(self, folder: str) -> None:
        """Files that are not as their receipt says; a receipt that cannot be read goes with the files that are made now."""
        files = processor_files(self.teacher.processor)
        receipt = f"{folder}/processor.json"
        said = receipt_of(self.storage, receipt)
        promised = said or {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
        for name, digest in promised.items():
            path = f"{folder}/processor/{name}"
            if self._hash(path) == digest:
                continue
            if name not in files or hashlib.sha256(files[name]).hexdigest() != digest:
                self.say(
                    folder, f"processor/{name} becomes another file here: same library versions as in the capture?"
                )
                return
            self.storage.put_bytes(files[name], path)
        if not said:
            self.storage.put_bytes(processor_receipt(files), receipt)

    def _canaries(self, folder: str) -> None:
        """From the preflight that they came from."""
        if not canaries.problems(self.storage, folder):
            return
        source = self.request.settings.calibration
        if not source:
            self.say(folder, "canaries come from `kdcli preflight`: name its cache with --calibration")
            return
        try:
            canaries.restore(Storage(source), self.storage, folder)
        except KdcliError as error:
            self.say(folder, str(error))

    def _head(self, folder: str) -> str | None:
        """The sha256 of the head that fields of hidden states are read with, its file made again where it has another one."""
        readers = [name for name, body in self.own.items() if body["head_sha256"]]
        lost = [name for name, one in self.lost.items() if reads_with_head(one)]
        if not readers and not lost:
            return None
        path, receipt = f"{folder}/{HEAD}", f"{folder}/head.json"
        said = receipt_of(self.storage, receipt).get("head_sha256")
        promised = {self.own[name]["head_sha256"] for name in readers} or {one for one in (said,) if one}
        digest = self._hash(path)
        if digest not in promised:
            data = container.pack({"weight": load_head(self.request.teacher, *self._loaded).cpu()})
            digest = hashlib.sha256(data).hexdigest()
            if promised and digest not in promised:
                self.say(folder, "the teacher's head is another one here")
                return None
            self.storage.put_bytes(data, path)
        if said != digest:
            self.storage.put_bytes(seal({"head_sha256": digest}), receipt)
        return digest

    @property
    def _loaded(self) -> tuple[Any, Any]:
        return self.teacher.processor, self.teacher.config

    def _calibrations(self, head: str | None) -> None:
        """Fit again what is damaged; a fit counts where it gives the very file that is named."""
        damaged = {name for name, body in self.own.items() if not all(map(self._is_whole, named_files(body).values()))}
        open_fields = damaged | {name for name, one in self.lost.items() if one.calibrated}
        for fits in self._fits(open_fields):
            open_fields -= {name for name in open_fields & fits.keys() if self._take(name, fits[name], head)}
            if not open_fields:
                return
        for name in sorted(open_fields):
            self.say(
                f"fields/{name}",
                "calibrated here it is another one than its shards were coded with: same machine kind, library versions, "
                "--calibration-rows, --batch-tokens and parameters as in the capture? A copy of the cache, or the preflight that it "
                "was taken from, has it too: name that with --calibration",
            )

    def _fits(self, wanted: set[str]) -> Iterator[dict[str, Calibration]]:
        """Calibrations that may be the lost ones: taken from elsewhere, fitted with their companions (as a capture does), or alone."""
        if not wanted:
            return
        fields = {name: self._new(name) for name in self.own if "calibration" in self.own[name]} | {
            name: one for name, one in self.lost.items() if one.calibrated
        }
        if self.request.settings.calibration:
            other, adopted = TeacherCache(self.request.settings.calibration), {}
            for name in wanted:
                with suppress(KdcliError):
                    adopted[name] = calibration_of(other, name, fields[name], self.teacher.fingerprint)
            yield adopted
        for bare in {self._parts_without(name) for name in wanted}:
            alike = {name: one for name, one in fields.items() if self._parts_without(name) == bare}
            for group in [alike, *({name: alike[name]} for name in sorted(wanted & alike.keys()) if len(alike) > 1)]:
                if not wanted & group.keys():
                    continue  # taken by now
                settings = replace(self.request.settings, parts_without_fields=tuple(sorted(bare)))
                request = replace(self.request, settings=settings)
                yield fit_fields(request, self.storage, self.cache.plan, self._loaded, group)

    def _new(self, name: str) -> Any:
        return create_field(name, self.own[name]["params"])

    def _parts_without(self, name: str) -> frozenset[str]:
        """Parts of which the field has nothing."""
        begun = {int(file[:6]) for file in self.storage.names(f"fields/{name}/data") if file[:6].isdecimal()}
        have = {one.part for shard, one in enumerate(self.cache.plan.slices) if shard in begun}
        return frozenset(self.cache.parts()) - have

    def _take(self, name: str, fitted: Calibration, head: str | None) -> bool:
        """Whether this calibration is the lost one; then its files are written."""
        made = calibration_files(self.teacher.folder, name, fitted)
        if name in self.own:
            broken = {role: file for role, file in named_files(self.own[name]).items() if not self._is_whole(file)}
            if any(role not in made or made[role][0]["sha256"] != file["sha256"] for role, file in broken.items()):
                return False
            for role, file in broken.items():
                self.storage.put_bytes(made[role][1], file["path"])
            return True
        choices = [[file, *self._on_disk(name, role, file)] for role, (file, _) in made.items()]
        descriptions = [dict(zip(made, chosen)) for chosen in product(*choices)]
        return self._describe(name, self.lost[name], head, descriptions, made)

    def _on_disk(self, name: str, role: str, file: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Existing whole files of this role: another machine's fit may be lost in its description alone."""
        folder = f"{self.teacher.folder}/calibration"
        for one in self.storage.names(folder):
            if one.startswith(f"{name}-{role}-") and f"{folder}/{one}" != file["path"]:
                digest = self._hash(f"{folder}/{one}")
                if digest and one == f"{name}-{role}-{digest[:12]}.safetensors":
                    yield {**file, "path": f"{folder}/{one}", "sha256": digest}

    def _describe(
        self,
        name: str,
        one: Field | CalibratedField,
        head: str | None,
        files: Iterable[Mapping[str, Any]],
        made: Mapping[str, tuple[Mapping[str, Any], bytes]] | None = None,
    ) -> bool:
        """Write ``field.json`` with those ``files`` that give it the hash that its commits name."""
        body = field_body(name, one, self.cache.plan, self.teacher.fingerprint, self.teacher.folder)
        for chosen in files:
            data = seal({**body, "head_sha256": head if reads_with_head(one) else None, **chosen})
            if not is_named(hashlib.sha256(data).hexdigest(), commits_of(self.storage, f"fields/{name}")):
                continue
            for role, (file, content) in (made or {}).items():
                if chosen[role] == file and not self._is_whole(file):
                    self.storage.put_bytes(content, str(file["path"]))
            self.storage.put_bytes(data, field_path(name))
            return True
        if not one.calibrated:
            self.say(
                f"fields/{name}",
                "its shards are bound to another description than these flags mean: give --teacher, --dtype, --fields and the field's "
                "parameters as in the capture",
            )
        return False

    def _is_whole(self, file: Mapping[str, Any]) -> bool:
        return self._hash(file["path"]) == file["sha256"]

    def _hash(self, path: str) -> str | None:
        """sha256 of a file, None where it is missing, or none."""
        try:
            return hashlib.sha256(self.storage.read(path)).hexdigest()
        except (FileNotFoundError, StrangeFile):
            return None


def receipt_of(storage: Storage, path: str) -> dict[str, str]:
    """What a receipt of the teacher's files says; nothing where it is lost or damaged."""
    said = receipt(storage, path)
    return said if isinstance(said, dict) else {}
