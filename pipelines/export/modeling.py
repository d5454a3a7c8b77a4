"""The classes of an exported student whose compressor stands where LLaVA's projector stands.

``package.py`` writes this file, with the student's own compressor in it, as ``modeling_compressed_llava.py`` beside the weights.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaModel, LlavaPreTrainedModel

from student_train.compression import site_of_config
from student_train.compressors import CompressorSpec
from student_train.compressors.adaptive_pool import build


class CompressedLlavaConfig(LlavaConfig):
    """LLaVA's configuration; ``compressor``: name, vision_tokens, layers, largest."""

    model_type = "compressed_llava"
    compressor: dict[str, Any] | None = None


class CompressedLlavaModel(LlavaModel):
    """LLaVA's model whose ``multi_modal_projector`` gives fewer tokens than the image has patches."""

    config: CompressedLlavaConfig
    config_class = CompressedLlavaConfig
    multi_modal_projector: Any

    def __init__(self, config: CompressedLlavaConfig):
        super().__init__(config)
        spec = CompressorSpec.from_entry(config.compressor or {})
        self.multi_modal_projector = build(spec, site_of_config(config), self.multi_modal_projector)


class CompressedLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """Generates as LLaVA does."""

    config: CompressedLlavaConfig
    config_class = CompressedLlavaConfig

    def __init__(self, config: CompressedLlavaConfig):
        LlavaPreTrainedModel.__init__(self, config)
        self.model = CompressedLlavaModel(config)
        text: Any = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()
