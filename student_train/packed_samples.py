"""Which students may read packed samples, and whether they keep them apart: looked at before the first step."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import nn

from student_train.config import TrainSettings
from student_train.losses.terms import FIRST_LAYER, kinds_of
from student_train.methods import draws
from student_train.packing import ONE_ROW, SEPARATING, Packing
from student_train.student import RowForward, in_eval
from teacher_cache.errors import CompatibilityError
from teacher_cache.families import family_of
from teacher_cache.models.kind import decoder_of, reads_images
from teacher_cache.preparing.batch import Batch

PROBE = 8
"""Tokens of each of two samples."""
CLOSE = 1e-3
"""Relative to the largest entry: one sample seen by another is off by far more."""
WITHOUT = "leave out --packing"


def chosen_packing(student: RowForward, method: Any, settings: TrainSettings) -> Packing | None:
    """None: a row each, as the settings say it, or because they leave it open and it cannot be otherwise, or would change draws."""
    if settings.packing is None:
        with suppress(CompatibilityError):
            return None if draws(method) else packing_of(student, method, settings)
        return None
    return packing_of(student, method, settings) if settings.packing else None


def packing_of(student: RowForward, method: Any, settings: TrainSettings) -> Packing:
    """How the student's samples are packed.

    Raises:
        CompatibilityError: the method, its compressor or the student's attention needs a row for every sample.
    """
    name = type(method).__name__
    if hasattr(method, "passes"):
        raise CompatibilityError(
            f"method {name} removes tokens inside the language model, a row for every sample: {WITHOUT}"
        )
    if FIRST_LAYER & kinds_of(method.terms()):
        raise CompatibilityError(f"method {name} reads the first layer's attention, a row for every sample: {WITHOUT}")
    if hasattr(student.projector, "draw"):
        raise CompatibilityError(
            f"compressor {settings.compressor or 'of the student'} draws a count of tokens for every step: {WITHOUT}"
        )
    config = student.model.config
    if reads_images(config) and not family_of(config).packs:
        raise CompatibilityError(
            f"family {config.model_type} is not known to keep images of packed samples apart: {WITHOUT}"
        )
    attention = student.model.config.get_text_config()._attn_implementation
    if attention not in (*SEPARATING, *ONE_ROW):
        raise CompatibilityError(
            f"attention {attention} does not keep packed samples apart: {WITHOUT}, or --attn-implementation sdpa"
        )
    check_apart(student)
    return Packing(attention in ONE_ROW, even_length(student.model), attention == "eager")


def even_length(model: Any) -> float:
    """Tokens of a row whose attention takes as many operations as the weights of a decoder layer: P / 2·H·d.

    P weights a layer, H heads of width d: a token takes 2·P operations of a layer's products, and 4·H·d of its attention for each token
    of its row.
    """
    text = model.config.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    decoder = decoder_of(model)
    with suppress(AttributeError):  # of text alone, and named otherwise
        decoder = family_of(model.config).language_model(decoder)
    inside = {id(one) for table in decoder.modules() if isinstance(table, nn.Embedding) for one in table.parameters()}
    weights = sum(one.numel() for one in decoder.parameters() if id(one) not in inside) / text.num_hidden_layers
    return weights / (2 * text.num_attention_heads * width)


@torch.no_grad()
def check_apart(student: RowForward) -> None:
    """Two short texts are read together, and the second alone. CompatibilityError where it sees the first."""
    decoder = decoder_of(student.model)
    size = min(PROBE * 2, student.model.get_input_embeddings().num_embeddings - 1)
    ids = torch.arange(1, size + 1, device=student.weight.device)[None]
    half = size // 2
    places = torch.arange(half, device=ids.device).repeat(2)[None]
    packed = Batch((), {"input_ids": ids[:, : 2 * half], "position_ids": places}, {}, {}, ids)
    positions = family_of(student.model.config).packed_positions(decoder, packed)
    with in_eval(student.model):
        both = decoder(input_ids=ids[:, : 2 * half], position_ids=positions, use_cache=False).last_hidden_state[
            0, half:
        ]
        alone = decoder(input_ids=ids[:, half : 2 * half], use_cache=False).last_hidden_state[0]
    off = (both - alone).abs().max() / alone.abs().max()
    if not off < CLOSE:
        raise CompatibilityError(
            f"{type(student.model).__name__} does not keep packed samples apart (states differ by {off:.1e} of the largest): {WITHOUT}"
        )
