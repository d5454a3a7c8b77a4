"""What the workers of a capture say of themselves while they run, in the cache's own storage: ``progress/RUN-WORKER.json``.

``kdcli cache status`` reads it from anywhere. A worker that was killed leaves its last word, which grows old; what a run has said is
removed when the run ends well, and everything when the cache is complete. Nothing here decides what is done: commits do.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from teacher_cache.errors import CacheError, one_line
from teacher_cache.shards.plain_files import StrangeFile
from teacher_cache.shards.schema import COUNT, misfit
from teacher_cache.shards.storage import Storage

FOLDER = "progress"
INTERVAL = 10.0
"""Seconds between two words of a worker."""
LOST_AFTER = 6 * INTERVAL
"""Seconds of silence after which a worker counts as lost: clocks of two machines differ, and object stores take their time."""
CLOCK_SLACK = 5.0
LONG_AGO = 3600.0
"""Seconds; a command that lives renews its word in any case."""


_WORD = {
    **dict.fromkeys(("worker", "host"), str),
    **dict.fromkeys(("started", "updated"), float),
    **dict.fromkeys(("shard_rows?", "rows?"), COUNT),
    "shard?": (COUNT, None),
    "error?": (str, None),
    "machine?": (str, None),
    "begun?": (COUNT, None),
    "doing?": str,
    "alone?": bool,
    "waited?": float,
}
_NAME = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{6}-[0-9a-f]{6}\.json")


@dataclass(frozen=True)
class Word:
    """A worker's last word.

    Attributes:
        shard: in hand, None between two. rows: captured since ``started``, those of the shard in hand (``shard_rows``) included.
        started, updated: seconds since 1970 by the worker's clock. error: one line, after a failure.
        host: name and process number. machine: where that number means this process; None where nobody can tell.
        begun: when the process began, in ticks since its machine did: a later one of the same number began at another time.
        waited: seconds since ``started`` that the teacher waited for rows to be encoded.
        doing: of a whole command (``presence``), which is no worker: its name. alone: nobody else may be at work.
    """

    worker: str
    host: str
    started: float
    updated: float
    shard: int | None = None
    shard_rows: int = 0
    rows: int = 0
    error: str | None = None
    machine: str | None = None
    begun: int | None = None
    doing: str = ""
    alone: bool = False
    waited: float = 0.0


class Heartbeat:
    """One worker's words: when it takes a shard, while it works on it (by a thread of their own), when it is done with it.

    Args:
        run: names the run, so that its end can remove what its workers said.
        doing, alone: of a whole command, as ``Word`` has them.
    """

    def __init__(self, storage: Storage, run: str, interval: float = INTERVAL, doing: str = "", alone: bool = False):
        now, begun = time.time(), None
        self._storage, self._interval = storage, interval
        host = f"{socket.gethostname()}:{os.getpid()}"
        name = f"{run}-{uuid.uuid4().hex[:6]}"
        with suppress(OSError):  # no Linux
            begun = int(_status("self")[19])
        self._word = Word(name, host, now, now, machine=this_machine(), begun=begun, doing=doing, alone=alone)
        self._lock = threading.Lock()

    @property
    def path(self) -> str:
        """Of the word, in the cache."""
        return f"{FOLDER}/{self._word.worker}.json"

    @contextmanager
    def on(self, shard: int) -> Iterator[None]:
        """Around the work on a shard."""
        self._change(shard=shard, shard_rows=0, error=None)
        self._say()
        try:
            with self.beating():
                yield
            self._change(shard=None, shard_rows=0)
        except BaseException as error:  # an interrupt too: nobody works here any more
            self._change(error=one_line(error)[:500] or type(error).__name__)
            raise
        finally:
            self._say()

    @contextmanager
    def beating(self) -> Iterator[None]:
        """The word is renewed, by a thread; behind this nothing is said any more, so that it can be removed."""
        done = threading.Event()
        thread = threading.Thread(target=self._beat, args=(done,), name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def advance(self, rows: int, waited: float = 0.0) -> None:
        """So many rows more. waited: seconds of all since the start, as ``Word`` has them."""
        with self._lock:
            word = self._word
            self._word = replace(word, rows=word.rows + rows, shard_rows=word.shard_rows + rows, waited=waited)

    def _say(self) -> None:
        """Write the word. A store that does not take it, for whatever reason of its own, is asked again at the next beat."""
        with suppress(Exception):  # a word is never worth a shard
            self.say()

    def say(self) -> None:
        """Write the word, or raise what the storage raises."""
        self._change(updated=time.time())
        said = json.dumps(asdict(self._word)).encode()
        for last in (False, False, True):
            try:
                return self._storage.put_bytes(said, self.path, durable=False)
            except FileNotFoundError:  # somebody removed the folder, which was empty
                if last:
                    raise

    def _change(self, **values: Any) -> None:
        with self._lock:
            self._word = replace(self._word, **values)

    def _beat(self, done: threading.Event) -> None:
        while not done.wait(self._interval):
            self._say()


def new_run() -> str:
    """A name for one run."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"


def words(storage: Storage) -> list[Word]:
    """The last word of every worker; what cannot be read (half gone, or nobody's) is left out."""
    return sorted((word for word in all_words(storage).values() if not word.doing), key=lambda word: word.worker)


def all_words(storage: Storage) -> dict[str, Word]:
    """Path in the cache → word, those of whole commands included."""
    found = {}
    for name in storage.names(FOLDER):
        with suppress(OSError, StrangeFile):
            found[f"{FOLDER}/{name}"] = parse_word(storage.read(f"{FOLDER}/{name}"))
    return {path: word for path, word in found.items() if word}


def word_files(storage: Storage) -> list[str]:
    """Paths of what is named as words are, readable or not."""
    return [f"{FOLDER}/{name}" for name in storage.names(FOLDER) if _NAME.fullmatch(name)]


def parse_word(data: bytes) -> Word | None:
    """None for what is no word of a worker."""
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        return None
    known = {one.name for one in fields(Word)}
    return None if misfit(body, _WORD) else Word(**{key: value for key, value in body.items() if key in known})


def this_machine() -> str | None:
    """This boot of this machine, and whose process numbers it counts: containers on it have numbers of their own."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return None


def is_here(word: Word) -> bool:
    """Whether this machine can tell if the worker's process lives. Of another user's it may say nothing but that the number is taken."""
    number = word.host.rpartition(":")[2]
    return bool(word.machine) and word.machine == this_machine() and number.isdecimal() and not _is_hidden(number)


def is_gone(word: Word) -> bool:
    """Whether the worker's process has surely ended; only the machine that it ran on can tell."""
    if not is_here(word):
        return False
    try:
        status = _status(word.host.rpartition(":")[2])
        # Killed, and not fetched yet; or another one by now, whoever's, which has the number of the one that was.
        begun = int(status[19])
        other = begun != word.begun if word.begun else _time_of(begun) > word.updated + CLOCK_SLACK
        return status[0] in "ZX" or other
    except (FileNotFoundError, ProcessLookupError):
        return True
    except (OSError, ValueError, IndexError):
        return False


def _status(number: str) -> list[str]:
    """What the kernel says of a process, from its state on; FileNotFoundError where there is none, or none that we may see."""
    return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()


def _is_hidden(number: str) -> bool:
    """Whether a process has this number, and is kept from us (``hidepid``)."""
    if Path(f"/proc/{number}/stat").exists():
        return False
    try:
        os.kill(int(number), 0)
    except (ProcessLookupError, OverflowError):  # no process; no number of one
        return False
    except OSError:
        return True
    return False


def _time_of(ticks: int) -> float:
    """Seconds since 1970 at which a process began that says so in ticks since this machine did."""
    (booted,) = (line.split()[1] for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime"))
    return int(booted) + ticks / os.sysconf("SC_CLK_TCK")


def forget(storage: Storage, run: str = "") -> None:
    """Remove what the workers of a run have said; of every run where none is named. What whole commands say stays for ``LONG_AGO``."""
    recent = time.time() - LONG_AGO
    commands = {path for path, word in all_words(storage).items() if word.doing and word.updated > recent}
    for name in storage.names(FOLDER):
        if name.startswith(run) and f"{FOLDER}/{name}" not in commands:
            with suppress(OSError, CacheError):  # somebody else was first
                storage.remove(f"{FOLDER}/{name}")
    storage.remove_empty_folders(FOLDER)


def summary(said: Sequence[Word], rows_left: int, now: float | None = None) -> dict[str, Any]:
    """What ``cache status`` shows: workers running, lost and failed, rows a second of those that run, seconds left.

    Args:
        rows_left: rows of the shards that are not committed.
    """
    now = time.time() if now is None else now
    failed = [word for word in said if word.error]
    working = [word for word in said if not word.error]
    lost = [word for word in working if now - word.updated > LOST_AFTER or is_gone(word)]
    alive = [word for word in working if word not in lost]
    rate = sum(word.rows / max(1.0, word.updated - word.started) for word in alive)
    left = max(0, rows_left - sum(word.shard_rows for word in alive))
    return {
        "running": [asdict(word) for word in alive],
        "lost": [asdict(word) for word in lost],
        "failed": [asdict(word) for word in failed],
        "rows_per_second": round(rate, 2),
        "seconds_left": round(left / rate) if rate and rows_left else None,
    }
