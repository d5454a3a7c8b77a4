"""How many bytes a row takes while it is captured: its pixels, its encoded images, and what the teacher will say of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from teacher_cache.batch import row_positions
from teacher_cache.records import Prepared, Sample
from teacher_cache.teachers.sampling import sampled_wants
from teacher_cache.teachers.text_vision import attention_layers

WINDOW_BYTES = 1 << 30
"""Of one window. Three are there at a time: one is prepared, one lies with the teacher, one is written."""
TOPK_BYTES = 12
"""An id (int64) and a log-prob (float32)."""
Weigh = Callable[[Sample, Prepared], int]


def input_bytes(sample: Sample, prepared: Prepared) -> int:
    """Pixels and encoded images."""
    pixels = sum(one.numel() * one.element_size() for one in prepared.pixels.values())
    return pixels + sum(len(image.data) for image in sample.images)


def weigher(wants: frozenset[str], teacher: Any, config: Any) -> Weigh:
    """Bytes of a row with the answer of a teacher to ``wants``.

    Args:
        teacher: ``state_bytes`` of it are those of a hidden state; without, four a dimension of ``config``.
    """
    text = config.get_text_config()
    state = getattr(teacher, "state_bytes", None) or 4 * int(text.hidden_size)
    heads = int(getattr(text, "num_attention_heads", 1))
    return lambda sample, prepared: input_bytes(sample, prepared) + output_bytes(prepared, wants, state, heads)


def output_bytes(prepared: Prepared, wants: frozenset[str], state: int, heads: int) -> int:
    """Of a ``TeacherOutput``. state: bytes of a hidden state. heads: of a decoder layer."""
    rows = {kind: len(at) for kind, at in row_positions(prepared).items()}
    total = 0
    for want in wants:
        name, _, rest = want.partition(".")
        if name in ("hidden", "features"):
            total += rows[rest] * state
        elif name == "topk":
            kind, k = rest.split(":")
            total += rows[kind] * int(k) * TOPK_BYTES
        elif name == "gram":
            total += rows["vision"] ** 2 * 4
    for kind, (_, size, _) in sampled_wants(wants).items():
        total += rows[kind] * size * TOPK_BYTES
    for asked in attention_layers(wants).values():
        total += (1 if asked == {"mean"} else heads) * rows["text"] * rows["vision"] * 4
    return total
