"""``kdcli cache inspect | status | verify | gc``: look at a cache without any model."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from pipelines.capture import canaries, heartbeat
from pipelines.capture.presence import at_work, dead_words
from pipelines.inspect.find_sample import Asked, find_row
from teacher_cache.errors import CacheError
from teacher_cache.models.head import topk_rows
from teacher_cache.planning.plan_file import read_plan
from teacher_cache.reading.cache import TeacherCache, read_receipt, read_tensors
from teacher_cache.reading.cached_samples import CachedSample, CachedSamples
from teacher_cache.reading.teacher_tokenizer import tokenizer_of
from teacher_cache.reading.verify import CALIBRATION_ROLES, OWN, Problem, orphans, verify
from teacher_cache.shards.commit import committed_shards, read_commit
from teacher_cache.shards.storage import Storage
from teacher_cache.signal_records import Sketch, TopK

WORDS = 3


@dataclass(frozen=True)
class Decoded:
    """One sample as words.

    Attributes:
        vision: for every vision token its likeliest words with probabilities. response: (token, likeliest words) per label.
        bytes: stored bytes of this sample by column.
    """

    row: CachedSample
    vision: list[list[tuple[str, float]]]
    response: list[tuple[str, list[tuple[str, float]]]]
    bytes: dict[str, int]


def hashes(cache: TeacherCache) -> dict[str, str]:
    """Column → hash that its commits are bound to."""
    return {"samples": "", **{f"fields/{name}": body["sha256"] for name, body in cache.fields.items()}}


def inspect(cache: TeacherCache, asked: Asked) -> Decoded:
    """That row of the cache as words."""
    done = [
        name
        for name in cache.fields
        if len(committed_shards(cache.storage, f"fields/{name}")) == len(cache.plan.slices)
    ]
    rows = CachedSamples(cache, cache.parts(), done)
    position, row = find_row(cache, rows, asked)
    found = rows.read(position, row)
    tokenizer = tokenizer_of(cache)
    sizes = stored_bytes(cache, rows.shards[position], found.key)
    vision = [words(tokenizer, head) for head in heads(cache, found, "vision")]
    response = [words(tokenizer, head) for head in heads(cache, found, "response")]
    labels = [token_text(tokenizer, int(i)) for i in found.text.response_ids.tolist()]
    return Decoded(found, vision, list(zip(labels, response)), sizes)


def heads(cache: TeacherCache, row: CachedSample, kind: str) -> list[tuple[list[int], list[float]]]:
    """(ids, log-probs) of the likeliest tokens of every row, from whichever field tells."""
    if f"{kind}_topk" in row.fields:
        topk: TopK = row.fields[f"{kind}_topk"]
    elif f"{kind}_hidden" in row.fields:
        name, record = f"{kind}_hidden", row.fields[f"{kind}_hidden"]
        if isinstance(record, Sketch):
            values, ids = torch.log_softmax(cache.low_rank_head(name).logits(record), dim=1).topk(WORDS, dim=1)
            return list(zip(ids.tolist(), values.tolist()))
        topk = topk_rows(record, cache.teacher_head(name), WORDS)
    else:
        return []
    return list(zip(topk.ids[:, :WORDS].tolist(), topk.log_probs[:, :WORDS].tolist()))


def token_text(tokenizer: Any, token: int) -> str:
    return tokenizer.decode([token]) if tokenizer is not None else str(token)


def words(tokenizer: Any, head: tuple[list[int], list[float]]) -> list[tuple[str, float]]:
    """[(word, probability)]"""
    ids, log_probs = head
    return [(token_text(tokenizer, i), float(torch.tensor(p).exp())) for i, p in zip(ids, log_probs)]


def stored_bytes(cache: TeacherCache, shard: int, key: str) -> dict[str, int]:
    sizes = {}
    for name in ["samples", *cache.fields]:
        if shard in committed_shards(cache.storage, f"fields/{name}" if name != "samples" else name):
            entry = next((e for e in cache.column(name).entries(shard) if e.key == key), None)
            sizes[name] = sum(member.size for member in entry.members) if entry else 0
    return sizes


def status(cache: TeacherCache) -> dict[str, Any]:
    """Shards done of every column, rows, bytes, skips by reason; ``work``: ``heartbeat.summary``, None where no worker says anything."""
    columns = {}
    for column in hashes(cache):
        commits = [read_commit(cache.storage, column, shard) for shard in committed_shards(cache.storage, column)]
        counts = sum((Counter(one.counts) for one in commits), Counter())
        columns[column] = {
            "done": len(commits),
            "shards": len(cache.plan.slices),
            "rows": sum(one.rows for one in commits),
            "written": sum(one.written for one in commits),
            "skipped": dict(Counter(skip.reason for one in commits for skip in one.skipped)),
            "bytes": sum(one.tar_bytes for one in commits),
            "counts": dict(counts),
        }
        if tail := cache.fields.get(column.removeprefix("fields/"), {}).get("params", {}).get("tail"):
            columns[column]["tail"] = tail
    rows = sum(one.rows for one in cache.plan.slices)
    left = set().union(*(missing_shards(cache, column) for column in columns))
    said = heartbeat.words(cache.storage)
    return {
        "cache": str(cache.storage),
        "plan_hash": cache.plan_hash,
        "shards": len(cache.plan.slices),
        "rows": rows,
        "columns": columns,
        "work": heartbeat.summary(said, sum(cache.plan.slices[shard].rows for shard in left)) if said else None,
    }


def survey(url: str) -> tuple[TeacherCache | None, list[Problem]]:
    """A cache that may be damaged anywhere, opened as far as it can be (None: its manifest cannot be read), and all its problems."""
    storage = Storage(url)
    refuse_no_cache(storage)
    try:
        cache = TeacherCache(url, tolerant=True)
    except CacheError as error:
        return None, [Problem("manifest.json", None, str(error))]
    return cache, check(cache)


def refuse_no_cache(storage: Storage) -> None:
    """CacheError where neither a manifest nor a column is there."""
    if not storage.exists("manifest.json") and not any(storage.names(folder) for folder in ("samples", "fields")):
        read_plan(storage)


def check(cache: TeacherCache) -> list[Problem]:
    """Every problem of the cache: damage, and what is not there."""
    columns = hashes(cache)
    columns |= {f"fields/{name}": promised_hash(cache.storage, f"fields/{name}") for name in cache.unreadable}
    problems = verify(cache.storage, columns)
    for column in columns:
        problems += [
            Problem(column, shard, f"not captured yet: run `{cache.made_by()}` again")
            for shard in missing_shards(cache, column)
        ]
    return problems + check_descriptions(cache)


def check_descriptions(cache: TeacherCache) -> list[Problem]:
    """What is wrong with ``field.json`` of every field, and with the files that it names."""
    problems = [Problem(f"fields/{name}", None, what) for name, what in cache.unreadable.items()]
    for folder in sorted({body["teacher_folder"] for body in cache.fields.values()}):
        found = [*teacher_problems(cache, folder), *canaries.problems(cache.storage, folder)]
        problems += [Problem(folder, None, what) for what in found]
    for name in cache.fields:
        problems += [Problem(f"fields/{name}", None, what) for what in reading_problems(cache, name)]
    return problems


def promised_hash(storage: Storage, column: str) -> str:
    """The hash of its ``field.json`` that most readable commits of a column are bound to, "" where there is none."""
    said: Counter[str] = Counter()
    for shard in committed_shards(storage, column):
        with suppress(CacheError):
            said[read_commit(storage, column, shard).column_hash] += 1
    return said.most_common(1)[0][0] if said else ""


def reading_problems(cache: TeacherCache, name: str) -> Iterator[str]:
    """What keeps a field from being read: its calibration, or the head that its rows are multiplied with."""
    body = cache.fields[name]
    files = [body[role] for role in CALIBRATION_ROLES if body.get(role)]
    if body["head_sha256"]:
        files.append({"path": f"{body['teacher_folder']}/head.safetensors", "sha256": body["head_sha256"]})
    for file in files:
        try:
            read_tensors(cache.storage, file, name)
        except CacheError as error:
            yield str(error)


def missing_shards(cache: TeacherCache, column: str) -> list[int]:
    """Shards that a column should have. A field may leave out whole parts (``parts_without_fields``), never some of a part.

    A tar without its commit counts too: of a capture that was killed, or of a commit that is lost, which may be a part's only one.
    """
    done = set(committed_shards(cache.storage, column))
    begun = {int(name[:6]) for name in cache.storage.names(f"{column}/data") if name[:6].isdecimal()}
    missing, every = [], dict[str, set[int]]()
    for shard, one in enumerate(cache.plan.slices):
        every.setdefault(one.part, set()).add(shard)
    for shards in every.values():
        if column == "samples" or shards & (done | begun) or not done | begun:
            missing += sorted(shards - done)
    return missing


def teacher_problems(cache: TeacherCache, folder: str) -> Iterator[str]:
    """What is wrong with the teacher's receipts and processor files. The head is checked against each field's description."""
    promised = receipt(cache.storage, f"{folder}/processor.json")
    if isinstance(promised, str):
        yield promised
    for name, digest in promised.items() if isinstance(promised, dict) else ():
        try:
            if hashlib.sha256(cache.storage.read(f"{folder}/processor/{name}")).hexdigest() != digest:
                yield f"processor/{name} does not have its checksum"
        except FileNotFoundError:
            yield f"processor/{name} is missing"
        except CacheError as error:
            yield str(error)
    heads = {one["head_sha256"] for one in cache.fields.values() if one["teacher_folder"] == folder} - {None}
    said = receipt(cache.storage, f"{folder}/head.json") if heads else {}
    if isinstance(said, str):
        yield said
    elif heads and said.get("head_sha256") not in heads:
        yield "head.json names another head than the fields that are read with it"


def receipt(storage: Storage, path: str) -> dict[str, str] | str:
    """What a receipt of the teacher's files says; what is wrong with it, in words, where it is."""
    try:
        return read_receipt(storage, path)
    except FileNotFoundError:
        return f"{path.rpartition('/')[2]} is missing"
    except CacheError as error:
        return str(error)


def collect_garbage(cache: TeacherCache, remove: bool) -> list[str]:
    """Files that no commit names, and what no field reads any more; removed where ``remove``.

    Only what has a name that kdcli gives is garbage, and nothing is removed while anybody else is at work in the cache.
    """
    if not remove:
        return garbage(cache)
    with at_work(cache.storage, "cache gc", alone=True):
        # Looked at again: a capture may have described a field since the cache was opened.
        found = garbage(TeacherCache(cache.storage.url))
        for name in found:
            cache.storage.remove(name)
    return found


def garbage(cache: TeacherCache) -> list[str]:
    """What ``collect_garbage`` would remove."""
    found = [*orphans(cache.storage, hashes(cache)), *left_by_fields(cache), *dead_words(cache.storage)]
    return list(dict.fromkeys(found))


def left_by_fields(cache: TeacherCache) -> list[str]:
    """What no field reads any more (it was dropped, or never described): teachers, heads, calibrations, and field folders."""
    bodies = list(cache.fields.values())
    left = [file for file in cache.storage.files("teacher") if not is_read(file, bodies)]
    undescribed = [name for name in cache.storage.names("fields") if name not in cache.fields]
    left += [file for name in undescribed for file in cache.storage.files(f"fields/{name}")]
    return [file for file in left if OWN.fullmatch(file)]


def is_read(file: str, bodies: Sequence[Mapping[str, Any]]) -> bool:
    """Whether reading one of these fields (their ``field.json``) takes a file below ``teacher/``."""
    folder = "/".join(file.split("/")[:2])
    own = [body for body in bodies if body["teacher_folder"] == folder]
    if file.startswith(f"{folder}/calibration/"):
        return any(file == body[role]["path"] for body in own for role in CALIBRATION_ROLES if body.get(role))
    if file.startswith(f"{folder}/head."):
        return any(body["head_sha256"] for body in own)
    return bool(own)
