"""``kdcli cache``: look at a cache; what changes one is in ``cache_edits``."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from pipelines.command_line.cache_edits import add_field, drop_field, merge, repair, subset
from pipelines.command_line.given import named_cache, open_cache
from pipelines.command_line.options import cache_named, column_named, config_option, json_option
from pipelines.command_line.output import say
from pipelines.command_line.tour import TourGroup


@click.group("cache", cls=TourGroup, commands=[repair, add_field, drop_field, subset, merge])
def cache_group() -> None:
    """Inspect, repair and edit a cache."""


@cache_group.command()
@cache_named
@config_option
@json_option
def status(url: str | None, config: str | None, as_json: bool) -> None:
    """Show shards, rows, skips by reason and bytes by field; during a capture also workers, speed and time left."""
    from pipelines.inspect import cache as inspect_cache
    from pipelines.terminal.tables import cache_table, work_lines

    body = inspect_cache.status(open_cache(url, config))
    if as_json:
        say(json.dumps(body))
        return
    say(cache_table(body["columns"], body["rows"]))
    if body["work"]:
        say(work_lines(body["work"]))


@cache_group.command()
@cache_named
@click.option("--row", type=int, help="Number of the sample in the cache, from 0; default 0.")
@click.option("--key", help="Key of the sample.")
@click.option("--source-row", type=int, help="Number of the row in the mixture, from 0 over the files of a part.")
@click.option("--id", help="Id in the data; takes the first sample with it.")
@click.option("--part", help="Part of the mixture, with --source-row or --id.")
@config_option
def inspect(url: str | None, config: str | None, **asked: Any) -> None:
    """Show one sample as words: the teacher's likeliest token at each vision patch and response position, and bytes by field."""
    from pipelines.inspect import cache as inspect_cache
    from pipelines.inspect.find_sample import Asked
    from pipelines.terminal.tables import sample_view

    which = Asked(**asked)
    say(sample_view(inspect_cache.inspect(open_cache(url, config), which)))


@cache_group.command()
@cache_named
@config_option
@json_option
def verify(url: str | None, config: str | None, as_json: bool) -> None:
    """Check every checksum. Exit status 1 if anything is damaged or missing."""
    from pipelines.inspect import cache as inspect_cache

    _, problems = inspect_cache.survey(named_cache(url, config))
    if as_json:
        say(json.dumps([vars(problem) for problem in problems]))
    else:
        for problem in problems:
            say(str(problem))
        say(f"{count_problems(problems)}: `kdcli cache repair` repairs damage" if problems else "every checksum holds")
    if problems:
        sys.exit(1)


def count_problems(problems: Any) -> str:
    """``1 problem``, ``2 problems``."""
    return f"{len(problems)} problem{'s' * (len(problems) != 1)}"


@cache_group.command()
@column_named("column", default="samples")
def urls(url: str | None, column: str) -> None:
    """Print the tar paths of a column (samples, or a field), ready for the webdataset library."""
    from teacher_cache.shards.commit import committed_shards, read_commit
    from teacher_cache.shards.places import as_listed

    cache = open_cache(url, None)
    reader, folder = cache.column(column), as_listed(str(cache.storage), cache.storage.local)
    for shard in committed_shards(cache.storage, reader.column):
        tar = f"{reader.column}/data/{read_commit(cache.storage, reader.column, shard).tar}"
        say(f"{folder}/{tar}")


@cache_group.command()
@cache_named
@click.option(
    "--yes", is_flag=True, help="Remove the files; without it they are only listed. Refused during a capture."
)
@config_option
def gc(url: str | None, yes: bool, config: str | None) -> None:
    """List or remove files that no commit names (left by killed or duplicate writers)."""
    from pipelines.inspect import cache as inspect_cache

    found = inspect_cache.collect_garbage(open_cache(url, config), remove=yes)
    for name in found:
        say(name)
    say(f"{len(found)} files {'removed' if yes else 'would be removed (--yes)'}")
