"""The three things that travel: Sample (a row as written), Prepared (a row as tokens), TeacherOutput (what the teacher said).

Shape letters used everywhere: T text+vision positions of the expanded sequence, N text tokens (placeholders not expanded),
R rows of one kind (vision or response), V vocabulary, D teacher width, K kept entries.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from teacher_cache.signal_records import Sampled, TopK

ROLES = ("system", "user", "assistant")
"""Role codes of text tokens: the index in this tuple is what is stored. The template's own tokens count to their turn."""


@dataclass(frozen=True)
class Turn:
    """One conversation turn; ``text`` keeps its ``<image>`` placeholders in place."""

    role: str
    text: str


@dataclass(frozen=True)
class Image:
    """One image exactly as the mixture holds it: ``data`` are the original, still encoded bytes."""

    name: str
    data: bytes


@dataclass(frozen=True)
class Sample:
    """One row of a mixture.

    Attributes:
        part: the mixture part (``caption``, ``sft``, …).
        ordinal: row number inside the part, counted from 0 over all its files. Never reused, also for skipped rows.
        source_id: the dataset's own id (they repeat in the wild, so it is never a key).
        place: where a person finds the row (``file.json row 17``).
        extra: further scalar columns of the row (``family``, ``data_source``), and ``answers``, a list of reference texts.
        notes: what is worth knowing though the row is used, as read from the mixture: (one of ``errors.ROW_NOTES``, what was seen).
    """

    part: str
    ordinal: int
    source_id: str
    place: str
    turns: tuple[Turn, ...]
    images: tuple[Image, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class SkipRecord:
    """A row that was not used, with its reason (one of ``errors.SKIP_REASONS``). Rows = written + skipped, always."""

    part: str
    ordinal: int
    source_id: str
    place: str
    reason: str
    detail: str


@dataclass(frozen=True)
class RowGroup:
    """A run of consecutive rows that one read opens: the unit that is permuted into slices.

    Attributes:
        start: ordinal of the first row, rows: how many.
        locator: JSON-able: ``file``, the number of the group's file in the part's paths, and the source's own way to get there fast (byte
            offset, parquet row group, …).
        characters: characters of text in the group, images: number of images; both only for balancing slices.
    """

    start: int
    rows: int
    locator: Mapping[str, Any]
    characters: int
    images: int


@dataclass(frozen=True)
class View:
    """One image view that the vision tower sees.

    Attributes:
        crop: (left, top, right, bottom) in pixels of the original image; it reaches beyond the image where the view is padded.
        grid: (rows, columns) of vision tokens that this view yields.
        newline: True where every grid row is followed by one newline token (LLaVA-NeXT).
        tail: tokens after the grid that show no patch (OneVision ends each of several images with one newline).
    """

    crop: tuple[int, int, int, int]
    grid: tuple[int, int]
    newline: bool = False
    tail: int = 0

    def tokens(self) -> int:
        """Vision tokens of this view, newlines included."""
        return self.grid[0] * (self.grid[1] + self.newline) + self.tail

    def places(self) -> Iterator[tuple[int, int, int]]:
        """(grid row, grid column, number of the token inside the view) of every patch; newline tokens are passed over."""
        rows, columns = self.grid
        for row in range(rows):
            for column in range(columns):
                yield row, column, row * (columns + self.newline) + column


@dataclass(frozen=True)
class ImageLayout:
    """Where one image's vision tokens come from: original (width, height) and its views in token order."""

    size: tuple[int, int]
    views: tuple[View, ...]

    def tokens(self) -> int:
        return sum(view.tokens() for view in self.views)


@dataclass(frozen=True)
class TextTokens:
    """The text of a row as tokens, placeholders *not* expanded (their number differs between teacher and student).

    Attributes:
        ids: uint32 ``[N]``; an image stands as no token at all, ``image_at`` says where. What a processor writes around an image
            (InternVL's start and end marks) is text of the turn that the image stands in.
        role: uint8 ``[N]``, index into ``ROLES``.
        turn: uint16 ``[N]``, which turn the token belongs to.
        response: bool ``[N]``, True where the token is a label (assistant answer and its end-of-turn token).
        image_at: for each image, the number of text tokens before its vision tokens.
    """

    ids: torch.Tensor
    role: torch.Tensor
    turn: torch.Tensor
    response: torch.Tensor
    image_at: tuple[int, ...]

    @property
    def response_ids(self) -> torch.Tensor:
        return self.ids[self.response]


@dataclass(frozen=True)
class Prepared:
    """A row as one model wants it.

    Attributes:
        key: ``{ordinal:09d}-{content hash}``, unique inside a part and equal for teacher and student.
        input_ids: int64 ``[T]``, placeholders expanded to one id per vision token.
        vision_positions: int64 ``[R_vision]``, where the vision tokens stand.
        text_positions: int64 ``[N]``, where the text tokens stand, in the order of ``text.ids``.
        response_rows: int64 ``[R_response]``: position t-1 of every response token t. THE next-token shift: the row at
            position t-1 predicts the token at t. Vision rows are *not* shifted: they are taken at the vision token itself.
        labels: int64 ``[R_response]``: the response token ids, aligned with ``response_rows``.
        pixels: the processor's other tensors (``pixel_values``, ``image_sizes``, …), empty for text-only rows; and the family's
            ``token_kinds``, where the model reads them.
        turns: turns of the row that are in it, the first ones; fewer than it has where ``over_length = "cut"`` dropped some.
            None: all.
        images: the row's images as the mixture holds them (the sample's own bytes), for a teacher that reads images itself.
        upright: whether their EXIF orientation was applied.
    """

    key: str
    part: str
    input_ids: torch.Tensor
    vision_positions: torch.Tensor
    text_positions: torch.Tensor
    response_rows: torch.Tensor
    labels: torch.Tensor
    text: TextTokens
    layout: tuple[ImageLayout, ...]
    pixels: Mapping[str, torch.Tensor]
    turns: int | None = None
    images: tuple[Image, ...] = ()
    upright: bool = True

    def __len__(self) -> int:
        return int(self.input_ids.shape[0])


@dataclass(frozen=True)
class TeacherOutput:
    """What the teacher said about one row; only what some field wants is there, the rest is None.

    Attributes:
        hidden: post-final-norm hidden states by row kind: ``vision`` ``[R_vision, D]``, ``response`` ``[R_response, D]``,
            ``text`` ``[N, D]`` (at the text token itself), in the teacher's dtype.
        topk: ``vision`` and ``response`` heads.
        sampled: ``vision`` and ``response`` samples.
        attention: by decoder layer, float32 ``[H, N, R_vision]``: probabilities that text tokens pay vision tokens; H = 1 where only
            their mean over heads was asked for.
        features: ``[R_vision, D]``: what the language model is given at the vision tokens, in the teacher's dtype.
        gram: float32 ``[R_vision, R_vision]``: Y·Yᵀ of the raw vision logits Y.
        layout: of the row's images: which grids its vision rows lie on.
        device: where the teacher is. All tensors are on the CPU; products with wide matrices are best done there.
    """

    hidden: Mapping[str, torch.Tensor] = field(default_factory=dict)
    topk: Mapping[str, TopK] = field(default_factory=dict)
    gram: torch.Tensor | None = None
    layout: tuple[ImageLayout, ...] = ()
    sampled: Mapping[str, Sampled] = field(default_factory=dict)
    attention: Mapping[int, torch.Tensor] = field(default_factory=dict)
    features: torch.Tensor | None = None
    device: torch.device = field(default_factory=partial(torch.device, "cpu"))
