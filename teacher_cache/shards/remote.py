"""Requests to an object store: options of its file system, what is tried again and how often, and what a user is told in the end.

The library below tries a request a few times within seconds; ``persistently`` tries the whole operation again for about a minute, which is
how long throttled buckets and restarted gateways take. Nothing here decides what is true: whatever is read is checked by its reader.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from teacher_cache.errors import CacheError, KdcliError

T = TypeVar("T")
READ_ONLY = ("http", "https")
LONGEST_WAIT_S = 20.0
TRIES, TIMEOUT = "KDCLI_STORE_TRIES", "KDCLI_STORE_TIMEOUT"
"""Environment: how often an operation is tried (6), and seconds that a connection may be silent (30)."""


class ShortRead(Exception):
    """The store sent fewer bytes than it was asked for, or others."""


def options(scheme: str) -> dict[str, Any]:
    """What the file system of a URL scheme is opened with."""
    silence = _number(TIMEOUT, 30.0)
    if scheme in ("s3", "s3a"):
        retries = {"mode": "standard", "max_attempts": 4}
        # Listings are not kept: those of a minute ago would say that what other workers wrote since is not there.
        return {
            "use_listings_cache": False,
            "config_kwargs": {"retries": retries, "connect_timeout": min(10.0, silence), "read_timeout": silence},
        }
    if scheme in READ_ONLY:
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=min(10.0, silence), sock_read=silence)
        return {"client_kwargs": {"timeout": timeout}}
    return {}


def persistently(place: str, call: Callable[[], T]) -> T:
    """``call()``, tried again while what it raises may pass. FileNotFoundError and FileExistsError are answers and are handed on.

    Raises:
        CacheError: naming ``place`` and the fix, for everything else.
    """
    tries = max(1, int(_number(TRIES, 6)))
    for number in range(tries):
        try:
            return call()
        except (KdcliError, FileExistsError):
            raise
        except FileNotFoundError as error:
            if _code(error) == "NoSuchBucket":
                raise CacheError(f"{place}: there is no such bucket: create it, or fix the URL") from None
            raise
        except Exception as error:  # libraries of all kinds lie behind a URL, each with errors of its own
            if fix := _for_good(error):
                raise CacheError(f"{place}: {_words(error)}: {fix}") from None
            if number + 1 == tries:
                raise CacheError(
                    f"{place}: the store failed {tries} times ({_words(error)}): check network, endpoint "
                    "and the store itself, then run the command again: it continues from here"
                ) from None
        time.sleep(min(LONGEST_WAIT_S, 2.0**number) * random.uniform(0.25, 1.0))  # apart: workers fail together
    raise AssertionError("unreachable")


def all_persistently(places: Sequence[str], call: Callable[[list[int]], Sequence[Any]]) -> list[Any]:
    """``call(numbers)`` asks for those of ``places`` at once, and answers with an exception for each that failed. Only these are asked
    for again, and a try counts where nothing came at all: of a hundred answers a shaky store always breaks some.

    Raises:
        as ``persistently``.
    """
    found: dict[int, Any] = {}
    left = list(range(len(places)))

    def ask() -> None:
        answers = call(left)
        came = {number: one for number, one in zip(left, answers, strict=True) if not isinstance(one, BaseException)}
        if not came:
            raise answers[0]
        found.update(came)

    while left:
        persistently(places[left[0]], ask)
        left = [number for number in left if number not in found]
        if left:
            time.sleep(random.uniform(0.05, 0.5))
    return [found[number] for number in range(len(places))]


def exactly(data: bytes | BaseException, count: int) -> bytes | BaseException:
    """``data`` where it has ``count`` bytes, or is an error itself; ShortRead else."""
    if isinstance(data, BaseException) or len(data) == count:
        return data
    return ShortRead(f"{len(data)} bytes came instead of {count}")


def is_empty(answer: object) -> bool:
    """Whether what came for a range from byte 0 says that the file has no bytes."""
    if not isinstance(answer, Exception):
        return False
    return getattr(answer, "status", None) == 416 or "InvalidRange" in f"{answer} {_code(answer)}"


def _for_good(error: Exception) -> str:
    """The fix of an error that would be the same next time; empty where it may pass."""
    kind = type(error).__name__
    if kind in ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "DefaultCredentialsError"):
        return "give credentials as for the store's own tools, e.g. AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    if isinstance(error, PermissionError) or getattr(error, "status", None) in (401, 403):
        return "these credentials may not do that there: ask for the permission, or use others"
    if isinstance(error, NotImplementedError):
        return "this kind of URL cannot be written to: use another one"
    if getattr(error, "status", None) is not None and 400 <= error.status < 500 and error.status not in (408, 429):  # type: ignore[attr-defined]
        return "mend the URL"
    return ""


def _code(error: BaseException) -> str:
    """The store's own error code, where a library kept it."""
    response = getattr(error.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def _words(error: Exception) -> str:
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def _number(name: str, default: float) -> float:
    try:
        return float(os.environ.get(name, default))
    except ValueError:
        raise KdcliError(f"{name} must be a number, got {os.environ[name]!r}") from None


def at_most(fs: Any, paths: list[str], numbers: list[int], most: int) -> list[Any]:
    """At most one byte more than ``most`` of each: the store is not asked for sizes first, and is not believed either."""
    found = fs.cat_ranges(paths, [0] * len(paths), [most + 1] * len(paths), on_error="return")
    return [b"" if is_empty(one) else one for one in found]
