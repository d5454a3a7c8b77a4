"""Answers on disk while they are made: ``FILE.partial``, a line a batch, from which the same evaluation goes on after a kill.

The first line says what the answers are of (model, questions, settings); every line begins with a checksum. From the first line on
that does not have its own, the rest is made again.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from teacher_cache.errors import CompatibilityError, KdcliError
from teacher_cache.planning.plan import content_hash, difference
from teacher_cache.records import Sample
from teacher_cache.shards.schema import COUNT, misfit
from teacher_cache.whole_file import is_special, naming_file

SUFFIX = ".partial"
_ROW = {"given": str, "nats": (float, None), "tokens": COUNT, "nll_skip": (str, None), "sure": [float], "right": [bool]}
_SKIP = {"skip": [str]}
_LINE = {"rows": [(_ROW, _SKIP)], "draws?": [str]}


@dataclass(frozen=True)
class KeepIn:
    """Where answers are kept; anew: what another evaluation left there goes, else it is refused."""

    path: Path
    anew: bool = False


def partial_of(*targets: str | None) -> KeepIn | None:
    """Beside the first of these files; None where none is given, or only what is no file (``/dev/stdout``)."""
    plain = (target for target in targets if target and not is_special(Path(target)))
    return next((KeepIn(Path(f"{target}{SUFFIX}")) for target in plain), None)


class KeptAnswers:
    """The batches of one evaluation that are on disk, in order; more are added behind them.

    Attributes:
        batches: rows of each, as ``add`` was given them. draws: states of the random generators behind the last one.
    """

    def __init__(self, file: BinaryIO, path: Path, identity: Mapping[str, Any], anew: bool):
        self.path, self._file = path, file
        self.batches: list[list[dict[str, Any]]] = []
        self.draws: list[str] = []
        there, end = None, 0
        for body, end_of_line in _lines(file):
            if there is None:
                there = body
            elif misfit(body, _LINE):
                break
            else:
                self.batches.append(body["rows"])
                self.draws = body.get("draws", [])
            end = end_of_line
        if there is not None and there != dict(identity):
            if not anew:
                lines = "; ".join(difference(there, dict(identity))).replace("cache ", "there ")
                raise CompatibilityError(
                    f"{path} has answers of another evaluation: {lines}: remove it, or name another file for this one"
                )
            there, end, self.batches, self.draws = None, 0, [], []
        with naming_file(path):
            file.truncate(end)
            file.seek(end)
        if there is None:
            self._append(dict(identity))

    def add(self, rows: Sequence[Mapping[str, Any]], draws: Sequence[str]) -> None:
        """A batch; DiskError where it cannot be written: those before it stay."""
        self._append({"rows": list(rows), **({"draws": list(draws)} if draws else {})})

    def _append(self, body: Mapping[str, Any]) -> None:
        text = json.dumps(body)
        with naming_file(self.path):
            self._file.write(f"{_sum(text)} {text}\n".encode())
            self._file.flush()
            os.fsync(self._file.fileno())


@contextmanager
def keeping(keep: KeepIn, identity: Mapping[str, Any]) -> Iterator[KeptAnswers]:
    """The kept answers of an evaluation, which nobody else adds to meanwhile.

    Raises:
        CompatibilityError: they are of another model, other questions or settings. KdcliError: another process is at it.
    """
    with naming_file(keep.path):
        keep.path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(keep.path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    with os.fdopen(handle, "r+b", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise KdcliError(f"{keep.path} is not a file: remove it")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise KdcliError(
                f"{keep.path}: another evaluation keeps its answers there: wait for it, or name another file"
            ) from None
        yield KeptAnswers(file, keep.path, identity, keep.anew)


def identity_of(model: str, questions: Sequence[Sample], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What answers depend on. Metrics are taken of existing answers, so they do not belong to it."""
    total = hashlib.sha256()
    for row in questions:
        body = {**asdict(row), "images": [hashlib.sha256(image.data).hexdigest() for image in row.images]}
        total.update(json.dumps({**body, "place": ""}, sort_keys=True, default=str).encode())
    return json.loads(
        json.dumps({"model": model_hash(model), "questions": f"{len(questions)}: {total.hexdigest()}", **settings})
    )


def model_hash(model: str) -> str:
    """Of every file that loading a model folder may read; a hub id stands for itself."""
    folder = Path(model)
    if not folder.is_dir():
        return model
    sums = {}
    for file in sorted(folder.iterdir()):
        if file.is_file() and not file.name.startswith(".") and file.suffix != ".md":
            with file.open("rb") as opened:
                sums[file.name] = hashlib.file_digest(opened, "sha256").hexdigest()
    return content_hash(sums)


def states_of(generators: Sequence[torch.Generator]) -> list[str]:
    """Their states as text; empty where none has drawn anything since its seed."""
    states = [one.get_state() for one in generators]
    fresh = [torch.Generator(one.device).manual_seed(one.initial_seed()).get_state() for one in generators]
    if all(torch.equal(*pair) for pair in zip(states, fresh)):
        return []
    return [base64.b64encode(one.numpy().tobytes()).decode() for one in states]


def set_states(generators: Sequence[torch.Generator], states: Sequence[str]) -> None:
    """The other way round; none: they stay as they are."""
    for generator, state in zip(generators, states):
        generator.set_state(torch.frombuffer(bytearray(base64.b64decode(state)), dtype=torch.uint8))


def _lines(file: BinaryIO) -> Iterator[tuple[dict[str, Any], int]]:
    """Whole lines with their own checksum, from the start on, each with the byte that it ends before."""
    end = 0
    for line in file.readall().splitlines(keepends=True):  # type: ignore[attr-defined]
        digest, _, text = line.partition(b" ")
        if not line.endswith(b"\n") or digest != _sum(text[:-1].decode(errors="replace")).encode():
            return
        try:
            body = json.loads(text)
        except (ValueError, RecursionError):
            return
        if not isinstance(body, dict):
            return
        end += len(line)
        yield body, end


def _sum(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
