"""Where something lies, out of what a user gave: a path of this machine, or the URL of a store. Nothing else here asks fsspec by name.

``scheme://…`` is a URL, everything else a path, and every sign in either means itself: fsspec's own reading of ``a::b`` (a chain of file
systems) or ``file:x`` (the path ``x``) would be another place than the one that was named. ``file://`` before a path says that it is one;
``~`` and ``~/…`` are the home folder; ``./`` before anything makes it a path.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from fsspec.archive import AbstractArchiveFileSystem
from fsspec.implementations.chained import ChainedFileSystem

from teacher_cache.errors import KdcliError, printable
from teacher_cache.shards.remote import READ_ONLY, options

LOCAL = ("file", "local")
BUCKETS = ("s3", "s3a", "gs", "gcs", "hf", *READ_ONLY)
"""Schemes whose URLs begin with a bucket or a host."""
THROUGH_OTHERS = ("reference", "generic", "data")
"""Schemes without bytes of their own, beside those that say so by their class."""
EXTRA = ("s3", "s3a", *READ_ONLY)
"""Schemes whose libraries come with the extra ``s3``."""
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_CHAIN = re.compile(r"[A-Za-z0-9+.-]+(::[A-Za-z0-9+.-]*)+://")
_ONE_SLASH = re.compile(rf"({'|'.join((*LOCAL, *BUCKETS))}):/[^/]")
_OTHERWISE = re.compile(r"~|[A-Za-z0-9+.:-]+:/")
"""How a relative path begins that would be read as something else, were it given as text."""


@dataclass(frozen=True)
class Place:
    """One place.

    Attributes:
        text: as it is shown, and given again means the same, in the same working folder.
        scheme: of the URL; ``file`` for a path.
        path: absolute where it is a path, else the URL.
    """

    text: str
    scheme: str
    path: str

    @property
    def local(self) -> bool:
        return self.scheme == "file"

    def open(self) -> tuple[Any, str]:
        """(fsspec file system, path in it); KdcliError where there is no such file system."""
        try:
            kind = fsspec.get_filesystem_class(self.scheme)
            if issubclass(kind, ChainedFileSystem | AbstractArchiveFileSystem) or self.scheme in THROUGH_OTHERS:
                raise KdcliError(
                    f"{self.text}: {self.scheme}:// is read through another place, which kdcli does not: {_COPY}"
                )
            found = kind(**kind._get_kwargs_from_urls(self.path) | options(self.scheme))
        except (ImportError, ValueError, TypeError, OSError) as error:
            advice = ": pip install 'kdcli[s3]'" if isinstance(error, ImportError) and self.scheme in EXTRA else ""
            advice = advice or (
                "" if self.scheme in fsspec.available_protocols() else f"; as a path it is ./{self.text}"
            )
            raise KdcliError(f"{self.text}: cannot be opened ({error}){advice}") from None
        return found, str(kind._strip_protocol(self.path))


_COPY = "copy its content to a folder or a store, and name that"


def place_of(given: str | Path, what: str = "") -> Place:
    """The place that was named; KdcliError in one line where no place has such a name. A ``Path`` is a path, whatever it looks like.

    Args:
        what: the flag or key that took it, for that line.
    """
    before = f"{what} {given}" if what else str(given)
    _refuse_signs(str(given), before)
    if isinstance(given, Path):
        return _local(given)
    if _CHAIN.match(given):
        raise KdcliError(
            f"{before}: URLs are not chained with :: here: {_COPY} (./ before a path that really has this name)"
        )
    if slip := _ONE_SLASH.match(given):
        raise KdcliError(
            f"{before}: a URL has two slashes ({slip[1]}://…), and a path of this name is written ./{given}"
        )
    url = _URL.match(given)
    if url and url[1] not in LOCAL:
        return Place(_checked_url(given, url[1], before), url[1], given.rstrip("/"))
    text = given[url.end() :] if url else given
    if not text:
        raise KdcliError(f"{before}: the name is empty")
    return _local(Path(os.path.expanduser(text) if not url and (text == "~" or text.startswith("~/")) else text))


def local_path(given: str | Path, what: str = "") -> Path:
    """``place_of`` as a path of this machine; KdcliError where it is a URL."""
    place = place_of(given, what)
    if not place.local:
        raise KdcliError(
            f"{what or given}{f' {given}' if what else ''}: must be on a disk of this machine, and this is a URL"
        )
    return Path(place.text)


def as_listed(shown: str, local: bool) -> str:
    """A place as webdataset takes it out of a list with a name a line: there ``pipe:x`` is a command, and ``a:b`` an address.

    Raises:
        KdcliError: it cannot stand on a line as it is.
    """
    if "\n" in shown or printable(shown) != shown:
        raise KdcliError(f"{shown!r}: no list of names can hold this one: link to it under another name, and name that")
    return f"./{shown}" if local and ":" in shown.partition("/")[0] else shown


def is_remote(given: str) -> bool:
    """Whether what was named lies behind a URL."""
    return not place_of(given).local


def _local(path: Path) -> Place:
    try:
        absolute = str(path if path.is_absolute() else Path.cwd() / path)
    except FileNotFoundError:
        raise KdcliError(f"{path}: the folder in which this was typed is gone: name the whole path") from None
    return Place(absolute if _OTHERWISE.match(str(path)) else str(path), "file", absolute)


def _refuse_signs(text: str, before: str) -> None:
    """What no place can be named with, or no document can hold."""
    if not text:
        raise KdcliError(f"{before.strip() or 'a place'}: the name is empty")
    if "\0" in text:
        raise KdcliError(f"{before!r}: no name holds a null byte")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise KdcliError(f"{before}: the name is not UTF-8: rename it, or link to it under another name") from None


def _checked_url(url: str, scheme: str, before: str) -> str:
    """The URL without a slash at its end; KdcliError where the libraries below would ask for something else than it says."""
    rest = url[len(scheme) + 3 :]
    if re.search(r"::[A-Za-z][A-Za-z0-9+.-]*://", rest):
        raise KdcliError(f"{before}: URLs are not chained with :: here: {_COPY}")
    if not rest.strip("/") or (scheme in BUCKETS and rest.startswith("/")):
        raise KdcliError(f"{before}: names no {'host' if scheme in READ_ONLY else 'bucket'}: write {scheme}://NAME/…")
    if {".", ".."} & set(rest.split("/")):
        raise KdcliError(f"{before}: . and .. mean nothing in a store: write the URL without them")
    if scheme in READ_ONLY and "#" in rest:
        raise KdcliError(f"{before}: a web server never receives the text after #: write %23")
    if "?versionId=" in rest and scheme not in READ_ONLY:
        raise KdcliError(f"{before}: versions of objects are not supported: name the object without one")
    return url.rstrip("/")
