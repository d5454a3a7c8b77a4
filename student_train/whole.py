"""Files of a run that must be found as they were left: written so that they survive a power cut, and known by their sums.

A finished stage's ``done.json`` and a checkpoint's ``state.json`` are sealed (they carry their own checksum) and name every file that
belongs to them with its size and sha256. Documents of before that name none are read as they are: their files are not checked.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from teacher_cache.errors import CacheError, KdcliError
from teacher_cache.shards import local_disk
from teacher_cache.shards.local_disk import sync_file, sync_folder
from teacher_cache.shards.schema import misfit
from teacher_cache.shards.sealed import SEAL, seal, unseal
from teacher_cache.whole_file import naming_file, write_whole

Sums = Mapping[str, Any]
"""Path below a folder, with ``/`` → ``[bytes, sha256]``."""
FILES = "files"
DONE_FILE = "done.json"
DONE = {"identity": dict, "result": dict}
"""What it holds at least."""
LOADED = (".safetensors", ".json", ".jinja", ".py", ".model", ".txt", ".bin")
"""Ends of names of files that change what is loaded of a model folder, whoever put them there."""


def make_folder(folder: Path) -> None:
    """``folder`` and those above it; each new one survives a power cut. DiskError where it cannot be made."""
    if "\0" in str(folder):
        raise KdcliError(f"{str(folder)!r}: this cannot be the name of a folder: choose another")
    with naming_file(folder):
        local_disk.make_folder(folder)


def write_sealed(path: Path, body: Mapping[str, Any]) -> None:
    write_whole(path, seal(json.loads(json.dumps(body))))


def sync_files(folder: Path) -> None:
    """Every file below ``folder``, and the folders themselves, to the disk."""
    for path, _, names in os.walk(folder):
        for name in names:
            sync_file(Path(path, name))
        sync_folder(Path(path))


def sums(folder: Path, names: Iterable[str]) -> dict[str, list[Any]]:
    """Size and sha256 of these files below ``folder``."""
    found = {}
    for name in names:
        with (folder / name).open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
            found[name] = [opened.tell(), digest]
    return found


def files_below(folder: Path) -> list[str]:
    """Every file below ``folder``, by its path from there."""
    return sorted(one.relative_to(folder).as_posix() for one in folder.rglob("*") if one.is_file())


def damage(folder: Path, known: Sums) -> str:
    """The first file that is not as its sum says, in words; "" where all are. Sizes are looked at first: they cost nothing."""
    for name, (size, _) in known.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (there := (folder / name).stat().st_size) != size:
            return f"{name} has {there} bytes, {size} were written"
    for name, (_, digest) in known.items():
        try:
            there = sums(folder, [name])[name][1]
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if there != digest:
            return f"{name} differs from the written file, by its sha256"
    return ""


def read_card(
    path: Path, shape: Mapping[str, Any], remedy: str = "remove its folder to do that part again"
) -> dict[str, Any]:
    """A JSON document that a run left beside its files.

    Args:
        remedy: ends the line.

    Raises:
        KdcliError: naming it, where it is damaged or of another shape.
    """
    try:
        data = path.read_bytes()
        body = json.loads(data)
    except (OSError, ValueError, RecursionError) as error:
        raise KdcliError(f"{path}: damaged ({error}): {remedy}") from None
    if isinstance(body, dict) and {SEAL, FILES} & body.keys():
        try:
            body = unseal(data, str(path))
        except CacheError:
            raise KdcliError(f"{path}: damaged (it does not have its own checksum): {remedy}") from None
    if wrong := misfit(body, dict(shape)) or _no_sums(body):
        raise KdcliError(f"{path}: {wrong}: it was not written by kdcli; {remedy}")
    return body


def _no_sums(body: Mapping[str, Any]) -> str:
    """What is wrong with the sums of a document that has some."""
    known = body.get(FILES, {})
    if not isinstance(known, dict):
        return f"{FILES} is not an object"
    for name, one in known.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name:
            return f"{FILES} names {name[:80]!r}, outside of its folder"
        if not (isinstance(one, list) and [type(part) for part in one] == [int, str]):
            return f"{FILES}.{name[:80]} is not a size with a sha256"
    return ""


# ---- a finished stage

REMOVE_DONE = "remove that file, and the same `kdcli train-student` finishes the stage again from its newest checkpoint"


def read_done(stage: Path) -> dict[str, Any]:
    """``done.json`` of a stage's folder."""
    return read_card(stage / DONE_FILE, DONE, REMOVE_DONE)


def finished_damage(stage: Path, done: Mapping[str, Any]) -> str:
    """What is wrong with the model (and the maps) that a finished stage left; "" where nothing is.

    What was found whole is not read again by the same process while sizes and times stay.
    """
    if FILES not in done:  # of a version without sums
        return model_unreadable(stage / "model")
    known = (stage.absolute(), *_times(stage, done[FILES]))
    if known in _whole:
        return ""
    wrong = damage(stage, done[FILES])
    if not wrong:
        _whole.add(known)
    return wrong


def added_files(stage: Path, done: Mapping[str, Any]) -> list[str]:
    """Files in a finished stage's model folder that it did not write and that a loader may read."""
    if FILES not in done:
        return []
    there = (f"model/{name}" for name in files_below(stage / "model"))
    return [name for name in there if name not in done[FILES] and name.endswith(LOADED) and "/." not in name]


def model_unreadable(model: Path) -> str:
    """What keeps a model folder from being read, as far as its files' own headers tell: cut or missing ones; "" where nothing does."""
    weights, index = set(model.glob("*.safetensors")), model / "model.safetensors.index.json"
    try:
        json.loads((model / "config.json").read_bytes())
        if index.is_file():
            weights |= {model / str(one) for one in json.loads(index.read_bytes())["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return " ".join(f"{type(error).__name__}: {error}".split())
    return unreadable(weights)


def unreadable(weights: Iterable[Path]) -> str:
    """Why one of these safetensors files cannot be read, by its header: it is cut, or gone. "" where all can."""
    from safetensors import SafetensorError, safe_open

    files = sorted(weights)
    try:
        for file in files:
            with safe_open(file, "pt"):
                pass
    except (OSError, SafetensorError) as error:
        return f"{file.name}: {' '.join(str(error).split())}"
    return "" if files else "it has no *.safetensors"


def check_model(model: Path) -> None:
    """Before a model is read that a stage of a run left: KdcliError where it is not what was written.

    A folder without such a stage around it, or finished by a version without sums, passes unseen.
    """
    stage = model.absolute().parent
    if model.absolute().name != "model" or not (stage / DONE_FILE).is_file():
        return
    done = read_done(stage)
    if FILES not in done:
        return
    if wrong := finished_damage(stage, done):
        raise KdcliError(
            f"{stage}: {wrong}: restore it, or run the same `kdcli train-student` again, which makes it again from the last checkpoint; "
            "make your own changes in a copy outside the run"
        )
    if added := added_files(stage, done):
        raise KdcliError(
            f"{stage}: the stage did not write {', '.join(added[:3])}: move that away, or use a copy of the folder"
        )


_whole: set[Any] = set()


def _times(stage: Path, names: Iterable[str]) -> Iterator[Any]:
    """Size, time and number of each file, and of the model's folder."""
    for name in (DONE_FILE, *names, "model"):
        try:
            found = (stage / name).stat()
            yield name, found.st_size, found.st_mtime_ns, found.st_ino
        except OSError:
            yield name, None
