"""The rows of a cache read back from its own ``samples`` column, as capture wants them: a cache needs no mixture to grow.

``samples`` holds turns and original image bytes, and its commits the rows that could not be used. So a field added later has the
same rows, keys and skips by construction, whatever became of the mixture's files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from teacher_cache.errors import CompatibilityError
from teacher_cache.preparing.prepare import Preparer
from teacher_cache.records import ImageLayout, Prepared, RowGroup, Sample, SkipRecord, TextTokens
from teacher_cache.samples import decode_sample
from teacher_cache.shards.reader import ColumnReader


@dataclass(frozen=True, kw_only=True)
class StoredSample(Sample):
    """A row as ``samples`` holds it: with the key, the tokens and the layout that the capture gave it."""

    key: str
    text: TextTokens
    layout: tuple[ImageLayout, ...]


@dataclass(frozen=True)
class StoredSamples:
    """One shard of ``samples`` in place of a mixture part.

    Args:
        samples: the ``samples`` column. shard: its number.
    """

    samples: ColumnReader
    shard: int

    def read(self, group: RowGroup) -> Iterator[Sample | SkipRecord]:
        """The rows of a group, exactly ``group.rows`` items in the capture's own order; CacheError where bytes are damaged."""
        rows = {entry.ordinal: row for row, entry in enumerate(self.samples.entries(self.shard))}
        skips = {skip.ordinal: skip for skip in self.samples.commit(self.shard).skipped}
        # A slice of a derived plan is one group of chosen rows; that of a scanned one names runs of consecutive rows.
        whole = "shard" in group.locator
        ordinals = [*skips, *rows] if whole else range(group.start, group.start + group.rows)
        for ordinal in ordinals:
            yield skips[ordinal] if ordinal in skips else self._sample(rows[ordinal])

    def _sample(self, row: int) -> StoredSample:
        key = self.samples.entries(self.shard)[row].key
        place = f"{self.samples.storage} shard {self.shard:06d} {key}"
        sample, text, layout = decode_sample(self.samples.read(self.shard, row), place)
        return StoredSample(**vars(sample), key=key, text=text, layout=layout)


class StoredPreparer(Preparer):
    """Prepares stored rows again, and refuses one that does not become the tokens and views that ``samples`` says it became."""

    def prepare(self, sample: Sample, template: str = "chat", max_image_pixels: int = 89_478_485) -> Prepared:
        prepared = super().prepare(sample, template, max_image_pixels)
        if not isinstance(sample, StoredSample):
            return prepared
        if not _same_text(prepared.text, sample.text) or prepared.layout != sample.layout:
            raise CompatibilityError(
                f"row {sample.key} ({sample.place}): here it becomes {len(prepared.text.ids)} text and "
                f"{len(prepared.vision_positions)} vision tokens that are not those stored in samples "
                f"({len(sample.text.ids)} and {sum(one.tokens() for one in sample.layout)}): use the library versions of the capture"
            )
        # The stored key covers the whole row; a row that was cut at a turn border would get another one here.
        return replace(prepared, key=sample.key)


def _same_text(one: TextTokens, other: TextTokens) -> bool:
    names = ("ids", "role", "turn", "response")
    return one.image_at == other.image_at and all(torch.equal(getattr(one, n), getattr(other, n)) for n in names)
