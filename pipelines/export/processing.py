"""The processor of an exported student with a compressor: as many placeholders an image as the compressor leaves.

``package.py`` writes this file as ``processing_compressed_llava.py`` beside the weights.
"""

from __future__ import annotations

from typing import Any

from transformers import LlavaProcessor
from transformers.processing_utils import MultiModalData


class CompressedLlavaProcessor(LlavaProcessor):
    """LLaVA's processor; ``vision_tokens``: of one image."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int | None = None,
        vision_feature_select_strategy: str | None = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        num_additional_image_tokens: int = 0,
        vision_tokens: int = 1,
        **kwargs: Any,
    ):
        self.vision_tokens = vision_tokens
        super().__init__(
            image_processor,
            tokenizer,
            patch_size,
            vision_feature_select_strategy,
            chat_template,
            image_token,
            num_additional_image_tokens,
            **kwargs,
        )

    def replace_image_token(self, image_inputs: Any, image_idx: int, **kwargs: Any) -> str:
        return self.image_token * self.vision_tokens

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **kwargs: Any) -> MultiModalData:
        # Servers ask for counts before any image is read; one view an image, whatever its size.
        if image_sizes is None:
            return MultiModalData()
        images = len(image_sizes)
        return MultiModalData(num_image_tokens=[self.vision_tokens] * images, num_image_patches=[1] * images)
