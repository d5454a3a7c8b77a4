"""What commands print: results to stdout, notes and bars to stderr."""

from __future__ import annotations

import json
from typing import Any

import click


def say(text: str, err: bool = False) -> None:
    """Print a result; what data brought into it (captions, ids, names) cannot drive the terminal."""
    from teacher_cache.errors import printable

    click.echo(printable(text), err=err)


def note(text: str) -> None:
    """A note beside the progress bars, on one line however wide the terminal is."""
    from teacher_cache.errors import printable

    console().print(printable(text), markup=False, highlight=False, soft_wrap=True)


def warn(text: str) -> None:
    """A note that stands out, on a line of its own however long."""
    from teacher_cache.errors import printable

    console().print(printable(text), style="bold red", markup=False, highlight=False, soft_wrap=True)


def console() -> Any:
    """The terminal of the progress bars."""
    from rich.console import Console

    return Console(stderr=True)


def say_summary(summary: dict[str, Any], as_json: bool, line: str | None = None) -> None:
    """A cache that was made or changed: as ``cache status`` says it, then the line and the notes.

    Raises:
        KdcliError: behind all that, where too many of its rows were skipped.
    """
    from pipelines.tables import cache_table
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
