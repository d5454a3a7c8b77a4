"""What commands print: results to stdout, notes and bars to stderr."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import click


def say(text: str, err: bool = False) -> None:
    """Print a result; what data brought into it (captions, ids, names) cannot drive the terminal.

    Raises:
        KdcliError: standard output does not take it (a full disk behind ``> file``).
    """
    from teacher_cache.errors import printable

    with naming_stdout() if not err else suppress(OSError):
        click.echo(printable(text), err=err)


@contextmanager
def naming_stdout() -> Iterator[None]:
    """Around what prints a result: a disk behind standard output that is full is one line. A reader that has gone (``| head``) is no
    error, and passes: click ends the command quietly."""
    from teacher_cache.errors import KdcliError, advice

    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno == errno.EPIPE:
            raise
        give_up_stdout()
        raise KdcliError(f"standard output: {error.strerror}: {advice(error)}") from None


def give_up_stdout() -> None:
    """What it still holds goes nowhere: Python would fail on it once more when it ends, and say so in its own words."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def hold_streams() -> None:
    """A stream that the caller closed (``>&-``) is the null device: else the next file that is opened gets its number, and what some
    library prints goes into that file."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it gets the lowest free number: this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))


def note(text: str) -> None:
    """A note beside the progress bars, on one line however wide the terminal is."""
    from teacher_cache.errors import printable

    console().print(printable(text), markup=False, highlight=False, soft_wrap=True)


def warn(text: str) -> None:
    """A note that stands out, on a line of its own however long."""
    from teacher_cache.errors import printable

    console().print(printable(text), style="bold red", markup=False, highlight=False, soft_wrap=True)


class _Beside:
    """stderr as bars and notes see it: where it takes nothing (a full disk behind ``2> log``), the work goes on without a word."""

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)

    def write(self, text: str) -> int:
        with suppress(OSError):
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            sys.stderr.flush()


def console() -> Any:
    """The terminal of the progress bars."""
    from rich.console import Console

    return Console(file=_Beside())  # type: ignore[arg-type]


def say_summary(summary: dict[str, Any], as_json: bool, line: str | None = None) -> None:
    """A cache that was made or changed: as ``cache status`` says it, then the line and the notes.

    Raises:
        KdcliError: behind all that, where too many of its rows were skipped.
    """
    from pipelines.terminal.tables import cache_table
    from teacher_cache.errors import KdcliError

    if as_json:
        say(json.dumps(summary))
    else:
        say(cache_table(summary["columns"], summary["rows"]))
        if line:
            say(line)
        for one in summary.get("notes", []):
            say(f"note: {one}")
    if summary.get("excess"):
        raise KdcliError("; ".join(summary["excess"]))
