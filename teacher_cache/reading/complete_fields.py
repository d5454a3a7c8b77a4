"""Which fields of a cache a run over some parts can read."""

from __future__ import annotations

from teacher_cache.errors import CacheError
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.shards.commit import committed_shards


def complete_fields(cache: TeacherCache, parts: tuple[str, ...]) -> list[str]:
    """Fields that every shard of the parts has; CacheError where ``samples`` itself is not complete."""
    shards = set(cache.shards(parts))
    missing = shards - set(committed_shards(cache.storage, "samples"))
    if missing:
        raise CacheError(
            f"{cache.storage}: {len(missing)} of {len(shards)} shards of part {', '.join(parts)} are not captured yet: "
            "run `kdcli cache-teacher` again to finish them"
        )
    found = [name for name in cache.fields if shards <= set(committed_shards(cache.storage, f"fields/{name}"))]
    if nameless := [name for name in found if not cache.fields[name]["teacher"]]:
        raise CacheError(f"{cache.storage}: field.json of {', '.join(nameless)} does not name its teacher")
    return found
