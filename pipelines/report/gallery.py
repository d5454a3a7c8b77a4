"""A few cached rows to look at: the image with the teacher's word for each patch, and its words for the answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from pipelines.inspect.cache import heads, token_text, words
from pipelines.report.picture import Picture, background_words, draw_pictures, visible
from teacher_cache.errors import KdcliError, SkipSample
from teacher_cache.preparing.fingerprint import preparation_version
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.reading.cached_samples import CachedSample, CachedSamples
from teacher_cache.reading.teacher_tokenizer import tokenizer_of
from teacher_cache.shards.commit import committed_shards

EXAMPLES = 6
SHARDS_LOOKED_AT = 6
ROWS_LOOKED_AT = 16
"""Rows of each such shard: enough to meet every kind of row, few enough for a cache on a bucket."""
CANDIDATES = 4
TOKENS_SHOWN = 40

Words = list[tuple[str, float]]


@dataclass(frozen=True)
class GalleryToken:
    """One label of an answer, and what the teacher expected in its place: (word, probability, it is the label)."""

    text: str
    expected: list[tuple[str, float, bool]]


@dataclass(frozen=True)
class GalleryExample:
    """One row as the page shows it."""

    key: str
    kind: str
    place: str
    turns: list[tuple[str, str]]
    pictures: list[Picture]
    tokens: list[GalleryToken]
    more_tokens: int


@dataclass
class Gallery:
    """examples, the words dimmed on all images, and what could not be shown and why."""

    examples: list[GalleryExample] = field(default_factory=list)
    background: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class DecodedFields:
    """A row and the teacher's words, before it is laid out."""

    row: CachedSample
    kind: str
    vision: list[Words]
    response: list[tuple[str, Words]]

    def variety(self) -> int:
        return len({one[0][0] for one in self.vision if one})


def cache_gallery(cache: TeacherCache) -> Gallery:
    """Rows with images out of every kind of row; of each kind those whose patches name the most different words."""
    gallery = Gallery()
    by_kind: dict[str, list[DecodedFields]] = {}
    tokenizer = tokenizer_of(cache)
    for part in cache.parts():
        try:
            for row in _rows(cache, part):
                kind = kind_of(row)
                if row.sample.images and len(by_kind.setdefault(kind, [])) < CANDIDATES:
                    by_kind[kind].append(decode(cache, tokenizer, row, kind))
        except KdcliError as error:
            gallery.notes.append(f"part {part}: {error}")
    ranked = [sorted(rows, key=lambda one: -one.variety()) for rows in by_kind.values()]
    rounds = [rows[i] for i in range(CANDIDATES) for rows in ranked if i < len(rows)]
    chosen = sorted(rounds[:EXAMPLES], key=lambda one: list(by_kind).index(one.kind))
    upright = preparation_version(cache.plan.preparation) > 1
    gallery.background = background_words([one.vision for one in chosen])
    for one in chosen:
        try:
            gallery.examples.append(example_of(one, set(gallery.background), upright))
        except (KdcliError, SkipSample) as error:
            gallery.notes.append(f"{one.row.key}: {error}")
    return gallery


def _rows(cache: TeacherCache, part: str) -> Iterator[CachedSample]:
    """The first rows of some shards spread over the part, with the fields that tell words."""
    shards = set(cache.shards([part]))
    done = [name for name in cache.fields if shards <= set(committed_shards(cache.storage, f"fields/{name}"))]
    fields = [name for kind in ("vision", "response") if (name := teller(done, kind))]
    rows = CachedSamples(cache, [part], fields)
    filled = [position for position, count in enumerate(rows.counts) if count]
    for position in filled[:: max(1, -(-len(filled) // SHARDS_LOOKED_AT))]:
        for row in range(min(ROWS_LOOKED_AT, rows.counts[position])):
            yield rows.read(position, row)


def teller(fields: Sequence[str], kind: str) -> str | None:
    """The cheapest field that tells the words of such rows."""
    return next((name for name in (f"{kind}_topk", f"{kind}_hidden") if name in fields), None)


def kind_of(row: CachedSample) -> str:
    source = row.sample.extra.get("family") or row.sample.extra.get("data_source")
    return f"{row.sample.part} / {source}" if source else row.sample.part


def decode(cache: TeacherCache, tokenizer: object, row: CachedSample, kind: str) -> DecodedFields:
    vision = [words(tokenizer, head) for head in heads(cache, row, "vision")]
    expected = [words(tokenizer, head) for head in heads(cache, row, "response")]
    labels = [token_text(tokenizer, int(i)) for i in row.text.response_ids.tolist()]
    return DecodedFields(row, kind, vision, list(zip(labels, expected)))


def example_of(one: DecodedFields, background: set[str], upright: bool) -> GalleryExample:
    tokens = [
        GalleryToken(visible(label), [(visible(word), p, word == label) for word, p in expected])
        for label, expected in one.response[:TOKENS_SHOWN]
    ]
    sample = one.row.sample
    return GalleryExample(
        key=one.row.key,
        kind=one.kind,
        place=sample.place,
        turns=[(turn.role, turn.text) for turn in sample.turns],
        pictures=draw_pictures(sample.images, one.row.layout, one.vision, background, upright),
        tokens=tokens,
        more_tokens=max(0, len(one.response) - TOKENS_SHOWN),
    )
