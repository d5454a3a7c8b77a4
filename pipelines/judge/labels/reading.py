"""The rows of a cache whose labels can be held against the teacher, and what it says of them. Pictures are read only where asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from student_train.distributions import OfLabels, of_labels
from student_train.needs import Need, Served, serve
from student_train.teacher_view import TeacherHeads
from teacher_cache.errors import KdcliError
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.reading.cached_samples import CachedSample, CachedSamples
from teacher_cache.reading.teacher_tokenizer import tokenizer_of
from teacher_cache.records import Sample
from teacher_cache.shards.commit import committed_shards

ROWS_AT_A_TIME = 64
SOURCE_COLUMNS = ("data_source", "source", "dataset", "family")
"""Columns of a mixture that name where a row is from, the first that a row has. Else it is the first folder of its first image."""


@dataclass(frozen=True)
class Read:
    """A row, where it lies, and what the teacher says of its response tokens."""

    spot: tuple[int, int]
    row: CachedSample
    said: OfLabels


class Reader:
    """The rows of a cache of which samples and a field that tells labels are committed, and what the teacher says of their labels.

    Raises:
        KdcliError: an unknown part; no field that tells, with the command that adds one.
    """

    def __init__(self, cache: TeacherCache, parts: Sequence[str] | None = None):
        self.cache, self.parts = cache, list(parts or cache.parts())
        shards = set(cache.shards(self.parts))
        there = set(committed_shards(cache.storage, "samples")) & shards
        done = {name: there & set(committed_shards(cache.storage, f"fields/{name}")) for name in cache.fields}
        available = {name: cache.fields[name]["params"] for name, own in done.items() if own}
        self.served = served(available, cache)
        self.shards = sorted(set.intersection(*(done[name] for name in self.served.names)))
        self.tokenizer = tokenizer_of(cache)
        self.ends = Ends(self.tokenizer)
        self.notes = list(self.served.notes)
        if self.tokenizer is None:
            self.notes.append(
                "the cache has no tokenizer: tokens are numbers, and the end of an answer counts as one of its tokens"
            )

    def of_part(self, part: str) -> list[int]:
        wanted = set(self.cache.shards([part]))
        return [shard for shard in self.shards if shard in wanted]

    def open(self, pictures: bool = False, extra: Sequence[str] = ()) -> CachedSamples:
        return CachedSamples(
            self.cache, self.parts, [*self.served.names, *extra], shards=self.shards, pictures=pictures
        )

    def read(self, rows: CachedSamples, signals: TeacherHeads, most: int) -> Iterator[Read]:
        """most: rows of each shard, the first ones."""
        for position, count in enumerate(rows.counts):
            count = min(count, most)
            for start in range(0, count, ROWS_AT_A_TIME):
                spots = [(position, row) for row in range(start, min(count, start + ROWS_AT_A_TIME))]
                some = rows.read_many(spots)
                labels = [row.text.response_ids.to(torch.int64) for row in some]
                records = {name: [row.fields[name] for row in some] for name in self.served.names}
                said = of_labels(signals.of_response(records), torch.cat(labels))
                split = zip(*(column.split([len(one) for one in labels]) for column in vars(said).values()))
                yield from map(Read, spots, some, (OfLabels(*columns) for columns in split))


def served(available: dict[str, Any], cache: TeacherCache) -> Served:
    """The field that tells what the teacher says of labels; KdcliError naming those that would."""
    try:
        return serve([Need("response_likeliest")], available, "doctor", str(cache.storage))
    except KdcliError:
        raise KdcliError(
            f"{cache.storage}: the teacher's view of labels is stored in response_topk or response_hidden; the cache has "
            f"{', '.join(sorted(available)) or 'no field'}: add one with `kdcli cache add-field {cache.storage} --field response_topk`"
        ) from None


class Ends:
    """Ids that do not count at the end of an answer: special tokens, and white space. None does where there is no tokenizer."""

    def __init__(self, tokenizer: Any):
        self._tokenizer, self._blank = tokenizer, dict[int, bool]()
        if tokenizer is not None:
            special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
            self._blank = dict.fromkeys(special, True)

    def __contains__(self, token: object) -> bool:
        if self._tokenizer is None or not isinstance(token, int):
            return False
        if token not in self._blank:
            self._blank[token] = not self._tokenizer.decode([token]).strip()
        return self._blank[token]


def source_of(sample: Sample) -> str:
    """Where a row is from, as far as it says; "" where it does not."""
    for name in SOURCE_COLUMNS:
        if isinstance(value := sample.extra.get(name), str) and value:
            return value
    if not sample.images:
        return "no image"
    folder, slash, _ = sample.images[0].name.lstrip("/").partition("/")
    return folder if slash else ""
