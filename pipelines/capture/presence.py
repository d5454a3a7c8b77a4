"""Who is at work in a cache: captures beside one another; what removes or replaces files, alone.

Each says so in ``progress/`` before it looks whether another one does, so that of two that begin at the same time at least one sees the
other. A word of this machine lives as long as its process. One of another machine lives while it is renewed: its age is the difference of
the times that the *storage* gave it and our own word, so clocks do not count; after ``GONE_AFTER`` seconds it counts as dead.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from pipelines.capture.heartbeat import FOLDER, Heartbeat, Word, all_words, is_gone, is_here, new_run, word_files
from teacher_cache.errors import FULL, NOT_ALLOWED, CacheError
from teacher_cache.shards.storage import Storage

GONE_AFTER = 180.0
"""Seconds without a renewal, which is due every ten: stores take their time, and what an edit removes is gone."""


@contextmanager
def at_work(storage: Storage, doing: str, alone: bool = False) -> Iterator[None]:
    """Around everything that a command writes into a cache, and what it looks at to decide that.

    Args:
        doing: the command, as others are told. alone: nobody else may be at work; without, nobody who must be alone.

    Raises:
        CacheError: who is at work, since when, and when to come again; or that the cache is not ours to write to.
    """
    own = Heartbeat(storage, new_run(), doing=doing, alone=alone)
    try:
        try:
            own.say()
        except OSError as error:
            if error.errno in NOT_ALLOWED:
                raise CacheError(
                    f"{storage}: cannot be written to ({error.strerror}: {error.filename}), so nothing was changed: ask its owner, or name "
                    "another one; to read it (`train-student`, `cache verify | inspect | status`) needs no more than it allows"
                ) from None
            # A disk without room for a word has none for a capture that begins either, and `gc` makes some.
            if not (alone and error.errno in FULL):
                raise
        refuse_others(storage, own.path, alone)
        with own.beating():
            yield
    finally:
        with suppress(OSError, CacheError):
            storage.remove(own.path)
        storage.remove_empty_folders(FOLDER)


def refuse_others(storage: Storage, own: str, alone: bool) -> None:
    """CacheError where another one is at work that cannot be beside us. own: path of our word."""
    # A command says more of itself than its workers do.
    for path, word in sorted(all_words(storage).items(), key=lambda one: not one[1].doing):
        if path == own or not (alone or word.alone):
            continue
        if (age := silence(storage, path, word, own)) is not None:
            who = f"`kdcli {word.doing[:40]}`" if word.doing else "a capture's worker"
            killed = (
                "" if is_here(word) else f"; where it was killed, come again when that word is {GONE_AFTER:.0f} s old"
            )
            raise CacheError(
                f"{storage}: {who} is at work here (on {word.host[:80]}, last word {max(age, 0.0):.0f} s ago in {path}), so nothing was "
                f"changed: wait for its end, or end it{killed}"
            )


def silence(storage: Storage, path: str, word: Word, own: str | None = None) -> float | None:
    """Seconds since a word that somebody is behind was said; None where nobody is. own: path of our word, said just now."""
    if word.error or is_gone(word):
        return None
    said = storage.modified(path)
    if said is None:  # it ended meanwhile
        return None
    age = ((own and storage.modified(own)) or time.time()) - said
    return age if is_here(word) or age <= GONE_AFTER else None


def dead_words(storage: Storage) -> list[str]:
    """Words that nobody is behind any more, by their paths."""
    said = all_words(storage)
    return [path for path in word_files(storage) if path not in said or silence(storage, path, said[path]) is None]
