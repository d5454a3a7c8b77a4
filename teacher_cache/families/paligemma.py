"""PaliGemma: its rows are refused (``Preparer``): its ``token_type_ids`` say which tokens look ahead, of a row without a suffix all."""

from __future__ import annotations

from teacher_cache.families.family import Family


class PaliGemma(Family):
    model_types = ("paligemma",)
    embeds_image_token = False


FAMILY = PaliGemma()
