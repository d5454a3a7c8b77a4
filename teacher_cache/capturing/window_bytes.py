"""How many bytes a row takes while it is captured: its pixels, its encoded images, and what the teacher will say of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from teacher_cache.preparing.batch import row_positions
from teacher_cache.records import Prepared, Sample
from teacher_cache.wants import Wants

WINDOW_BYTES = 1 << 30
"""Of one window. Three are there at a time: one is prepared, one lies with the teacher, one is written."""
TOPK_BYTES = 12
"""An id (int64) and a log-prob (float32)."""
Weigh = Callable[[Sample, Prepared], int]


def input_bytes(sample: Sample, prepared: Prepared) -> int:
    """Pixels and encoded images."""
    pixels = sum(one.numel() * one.element_size() for one in prepared.pixels.values())
    return pixels + sum(len(image.data) for image in sample.images)


def weigher(wants: Wants, teacher: Any, config: Any) -> Weigh:
    """Bytes of a row with the answer of a teacher to ``wants``.

    Args:
        teacher: ``state_bytes`` of it are those of a hidden state; without, four a dimension of ``config``.
    """
    text = config.get_text_config()
    state = getattr(teacher, "state_bytes", None) or 4 * int(text.hidden_size)
    heads = int(getattr(text, "num_attention_heads", 1))
    return lambda sample, prepared: input_bytes(sample, prepared) + output_bytes(prepared, wants, state, heads)


def output_bytes(prepared: Prepared, wants: Wants, state: int, heads: int) -> int:
    """Of a ``TeacherOutput``. state: bytes of a hidden state. heads: of a decoder layer."""
    rows = {kind: len(at) for kind, at in row_positions(prepared).items()}
    total = (sum(rows[kind] for kind in wants.hidden) + wants.features * rows["vision"]) * state
    total += sum(rows[kind] * k for kind, k in wants.topk.items()) * TOPK_BYTES
    total += sum(rows[kind] * one.size for kind, one in wants.sampled.items()) * TOPK_BYTES
    total += wants.gram * rows["vision"] ** 2 * 4
    for asked in wants.attention.values():
        total += (1 if asked == "mean" else heads) * rows["text"] * rows["vision"] * 4
    return total
