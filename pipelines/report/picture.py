"""One image under its grid of words, as geometry that the template draws."""

from __future__ import annotations

import base64
import io
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import PIL.Image

from teacher_cache.records import Image, ImageLayout, View
from teacher_cache.sources.usable_samples import decode_image

CELL = 40
LONGEST_WORD = 11
LONGEST_SIDE = 576
MAX_PIXELS = 89_478_485
STEPS = 6
"""Probabilities are drawn in so many steps of colour and opacity."""

Words = list[tuple[str, float]]


@dataclass(frozen=True)
class PictureCell:
    """A word at its patch: x, y the patch's centre, size in the picture's units, level 0 … STEPS - 1 by probability.

    word: as drawn, shortened where it is long. told: the likeliest words with their probabilities.
    """

    x: float
    y: float
    top: float
    word: str
    size: float
    level: int
    dim: bool
    told: str


@dataclass(frozen=True)
class Picture:
    """One view of one image.

    Attributes:
        source: data URI of what the view shows. width, height: of the drawing, CELL units a column.
        flow: the words in token order instead of cells, where the layout tells no grid.
    """

    source: str
    columns: int
    rows: int
    width: float
    height: float
    cell_height: float
    cells: list[PictureCell]
    flow: list[PictureCell]
    counts: list[tuple[str, int]]
    caption: str

    @property
    def description(self) -> str:
        listed = ", ".join(f"{word} {count} times" for word, count in self.counts)
        return f"{self.caption}. Likeliest words by patch: {listed or 'none stored'}"


def visible(token: str) -> str:
    """A token's text with its leading space dropped, and the white space that is all of it made visible."""
    text = token.strip()
    return text or token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣") or "∅"


def background_words(images: Sequence[Sequence[Words]]) -> list[str]:
    """Words that say "nothing here": likeliest at many patches of most images. Each image counts the same.

    A word that fills one image only is its subject, not its background.
    """
    shares: Counter[str] = Counter()
    present: Counter[str] = Counter()
    told = [[one[0][0] for one in image if one] for image in images]
    told = [tops for tops in told if tops]
    for tops in told:
        for word, count in Counter(tops).items():
            shares[word] += count / len(tops) / len(told)  # type: ignore[assignment]
            present[word] += 1
    many = max(2, math.ceil(len(told) * 2 / 3))
    return sorted(visible(word) for word in shares if shares[word] >= 0.15 and present[word] >= many)


def draw_pictures(
    images: Sequence[Image],
    layout: Sequence[ImageLayout],
    vision: Sequence[Words],
    background: set[str],
    upright: bool = True,
) -> list[Picture]:
    """The first view of every image: further ones (tiles) show parts of it again, and are only counted in the caption.

    upright: whether the images' EXIF orientation was applied.
    """
    pictures, at = [], 0
    for number, (image, one) in enumerate(zip(images, layout)):
        pixels = decode_image(image, MAX_PIXELS, upright)
        caption = f"Image {number + 1}, " if len(images) > 1 else "Image, "
        caption += f"{one.size[0]}×{one.size[1]} pixels, {one.tokens()} vision tokens"
        if len(one.views) > 1:
            caption += f" in {len(one.views)} views, the first is shown"
        view = one.views[0]
        pictures.append(_draw(pixels, view, list(patches(view, vision[at:])), background, caption))
        at += one.tokens()
    return pictures


def patches(view: View, vision: Sequence[Words]) -> Iterator[tuple[int, int, Words]]:
    """(row, column, words) of every patch of a view; newline tokens after a grid row are passed over."""
    for row, column, place in view.places():
        if place < len(vision):
            yield row, column, vision[place]


def _draw(
    pixels: PIL.Image.Image, view: View, told: list[tuple[int, int, Words]], background: set[str], caption: str
) -> Picture:
    rows, columns = view.grid
    shown = pixels.crop(view.crop)
    unknown = rows == 1 and columns > 1  # how the capture notes a model whose grid it does not know
    across = 12 if unknown else columns
    cell_height = CELL if unknown else CELL * (shown.height / rows) / (shown.width / columns)
    height = across * CELL * shown.height / shown.width if unknown else rows * cell_height
    cells = [_cell(row, column, words, cell_height, background) for row, column, words in told]
    counts = Counter(visible(words[0][0]) for _, _, words in told).most_common(8)
    return Picture(
        source=data_uri(shown),
        columns=across,
        rows=rows,
        width=across * CELL,
        height=round(height, 1),
        cell_height=round(cell_height, 1),
        cells=[] if unknown else cells,
        flow=cells if unknown else [],
        counts=counts,
        caption=caption,
    )


def _cell(row: int, column: int, words: Words, height: float, background: set[str]) -> PictureCell:
    full = visible(words[0][0])
    word = full if len(full) <= LONGEST_WORD else full[: LONGEST_WORD - 1] + "…"
    size = min(0.3 * CELL, 0.45 * height, 0.9 * CELL / (0.61 * len(word)))  # 0.61: a monospaced letter to its size
    probability = words[0][1]
    return PictureCell(
        x=(column + 0.5) * CELL,
        y=round((row + 0.5) * height, 1),
        top=round(row * height, 1),
        word=word,
        size=round(size, 1),
        level=min(STEPS - 1, int(probability * STEPS)),
        dim=full in background or not any(character.isalnum() for character in full),
        told=", ".join(f"{visible(text)} {100 * p:.0f} %" for text, p in words),
    )


def data_uri(image: PIL.Image.Image) -> str:
    """The smaller of PNG and JPEG, at most LONGEST_SIDE pixels long. Always encoded anew: the row's bytes are untrusted."""
    small = image.copy()
    small.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    encoded = []
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 85})):
        buffer = io.BytesIO()
        small.save(buffer, kind.upper(), **options)
        encoded.append((kind, buffer.getvalue()))
    kind, data = min(encoded, key=lambda one: len(one[1]))
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
