"""Files that a mixture is made of: finding them, opening them, binding a plan to their content."""

from __future__ import annotations

import glob
import hashlib
import os
import re
from pathlib import Path
from typing import Any, BinaryIO, cast

import braceexpand

from teacher_cache.errors import DataError, without_secrets
from teacher_cache.shards.places import is_remote, local_path, place_of

_GLOB = re.compile(r"[*?\[]")
_HASH_CHUNK_BYTES = 1 << 20


def expand_paths(pattern: str) -> list[str]:
    """The files that a path, glob or brace URL (``x-{000..003}.parquet``) names, each once, sorted.

    Raises:
        DataError: nothing is there, a folder is named, or one of the brace's files is absent.
        KdcliError: of ``place_of``.
    """
    if is_remote(pattern) and without_secrets(pattern) != pattern:
        raise DataError(
            f"{without_secrets(pattern)}: a password, signature or key in an address would be stored in the cache's manifest: give it in "
            "the environment or the configuration of the store's client instead"
        )
    if not is_remote(pattern):
        pattern = str(local_path(pattern))
    # A file may really be called ``a[1].json``: what exists by its literal name is never taken for a pattern.
    if _is_file(pattern):
        return [pattern]
    if not is_remote(pattern):
        _refuse_folder(pattern)
    folder = _folder_as_it_stands(pattern)
    try:
        # braceexpand reads a backslash as an escape; paths mean it literally.
        names = list(braceexpand.braceexpand(pattern.removeprefix(folder), escape=False))
    except ValueError as error:
        raise DataError(f"{pattern}: unbalanced braces; write x-{{000..003}}.parquet") from error
    found = {path for name in names for path in _expand_one(folder, name, pattern)}
    return sorted(found)


def _folder_as_it_stands(pattern: str) -> str:
    """The beginning that is a folder by its literal name, up to its slash: ``run[1]/`` of ``run[1]/*.json`` where there is one."""
    end = 0
    for slash in re.finditer("/", "" if is_remote(pattern) else pattern):
        if not os.path.isdir(pattern[: slash.end()]):
            break
        end = slash.end()
    return pattern[:end]


def _expand_one(folder: str, rest: str, pattern: str) -> list[str]:
    name = folder + rest
    if _is_file(name):
        return [name]
    named_by = "" if name == pattern else f" (named by {pattern})"
    if _GLOB.search(rest):
        matches = _glob(folder, rest)
        if not matches:
            raise DataError(f"{name}: no file matches{named_by}; check the path and quote the pattern in the shell")
        return matches
    _refuse_folder(name)
    raise DataError(f"{name}: no such file{named_by}; check the path given to --data")


def _glob(folder: str, rest: str) -> list[str]:
    name = folder + rest
    if not is_remote(name):
        name = glob.escape(folder) + rest
        # Not fsspec's glob: it makes paths absolute, and ``{a.json,*.json}`` would then name one file in two ways.
        return [str(local_path(Path(path))) for path in glob.glob(name, recursive=True) if os.path.isfile(path)]
    filesystem, inner = place_of(name).open()
    return [filesystem.unstrip_protocol(path) for path in map(str, filesystem.glob(inner)) if filesystem.isfile(path)]


def _is_file(path: str) -> bool:
    if not is_remote(path):
        return os.path.isfile(path)
    filesystem, inner = place_of(path).open()
    return bool(filesystem.isfile(inner))


def _refuse_folder(path: str) -> None:
    filesystem, inner = place_of(path).open()
    if filesystem.isdir(inner):
        raise DataError(f"{path} is a folder; name its files, as in {os.path.join(path, '*.parquet')}")


def open_binary(path: str) -> BinaryIO:
    """Open for reading, seekable.

    Raises:
        DataError: the file cannot be opened.
    """
    try:
        if is_remote(path):
            filesystem, inner = place_of(path).open()
            return cast(BinaryIO, filesystem.open(inner, "rb"))
        return open(local_path(path), "rb")
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{path} cannot be opened: {reason}; check that it exists and is readable") from error


def first_bytes(path: str, count: int) -> bytes:
    with open_binary(path) as stream:
        return stream.read(count)


def fingerprint_files(format_name: str, paths: list[str]) -> dict[str, Any]:
    """Format, and name, size in bytes and sha256 of every file.

    Names go without their folder: data that moved as a whole is still the same data.
    """
    return {"format": format_name, "files": [_fingerprint_one(path) for path in paths]}


def _fingerprint_one(path: str) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    with open_binary(path) as stream:
        while chunk := stream.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return {"name": os.path.basename(path), "bytes": size, "sha256": digest.hexdigest()}
