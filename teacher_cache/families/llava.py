"""LLaVA-1.5: one view an image, a centred square where the processor crops."""

from __future__ import annotations

from teacher_cache.families.family import Family


class Llava(Family):
    model_types = ("llava",)
    packs = True
    stock_class = "LlavaForConditionalGeneration"


FAMILY = Llava()
