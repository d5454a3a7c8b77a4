"""Two kinds of teachers and students, told apart by their configuration: models of images and text, and language models of text alone.

Everything else is the same for both. What prepares a row has two forms: a model's own processor, or ``TextProcessor`` around a tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from teacher_cache.errors import CompatibilityError, KdcliError, check_reads_images
from teacher_cache.families import family_of
from teacher_cache.models.files import check_model_files
from teacher_cache.models.loading import naming_what_fails, try_tokenizer

IMAGE_PROCESSOR = ("preprocessor_config.json", "processor_config.json")
"""Where a folder keeps the settings of its image processor; one of them is enough."""


class TextProcessor:
    """A tokenizer where a multimodal model has its processor. It writes nothing for an image: rows with images are skipped.

    Attributes:
        chat_template: None: a chat is written by the tokenizer's own.
    """

    image_processor = None
    chat_template = None

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def __call__(
        self, text: Sequence[str], add_special_tokens: bool = True, padding_side: str = "right", **_: Any
    ) -> Any:
        """``input_ids`` and ``attention_mask``, int64 ``[texts, T]``, padded with the id that stands for ``pad_token``, or 0: language
        models without one are common, and no padding is ever read."""
        from transformers import BatchEncoding

        rows = self.tokenizer(list(text), add_special_tokens=add_special_tokens)["input_ids"]
        ids = torch.full((len(rows), max(map(len, rows))), self.tokenizer.pad_token_id or 0, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            at = slice(ids.shape[1] - len(row), None) if padding_side == "left" else slice(0, len(row))
            ids[i, at], mask[i, at] = torch.tensor(row, dtype=torch.int64), 1
        return BatchEncoding({"input_ids": ids, "attention_mask": mask})

    def save_pretrained(self, folder: str | Path) -> None:
        self.tokenizer.save_pretrained(folder)


def open_processor(
    what: str, name: str, revision: str | None = None, trust_remote_code: bool = False
) -> tuple[Any, Any]:
    """(what prepares rows, configuration) of a model, without any weights.

    Args:
        what: names the model in errors, e.g. ``student 'runs/01-SFT/model'``.

    Raises:
        KdcliError: it is not to be had, its processor is absent or broken, or it is neither kind of model.
    """
    from transformers import AutoProcessor, AutoTokenizer

    config = open_config(what, name, revision, trust_remote_code)
    arguments = {"revision": revision, "trust_remote_code": trust_remote_code}
    images = reads_images(config)
    if not images and not _reads_text(config):
        raise CompatibilityError(
            f"{what} ({type(config).__name__}) is neither an image-text-to-text model nor a causal language model: give a model that "
            "AutoModelForImageTextToText or AutoModelForCausalLM loads"
        )
    if images and (absent := _absent_processor(name)):
        raise KdcliError(f"{what} {absent}")
    with naming_what_fails(what):
        if images:
            processor = AutoProcessor.from_pretrained(name, **arguments)
            check_reads_images(what, processor, config)
        else:
            processor = TextProcessor(AutoTokenizer.from_pretrained(name, **arguments))
            _check_fast(what, processor.tokenizer)
        try_tokenizer(processor.tokenizer)
    return processor, config


def open_config(what: str, name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """A model's configuration; KdcliError where it is not to be had, or where its files say what no model says."""
    from transformers import AutoConfig

    check_model_files(what, name, revision, trust_remote_code)
    with naming_what_fails(what):
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)


def _check_fast(what: str, tokenizer: Any) -> None:
    if not getattr(tokenizer, "is_fast", False):
        raise CompatibilityError(
            f"{what}: {type(tokenizer).__name__} gives no positions of its tokens in the text, and labels need them: give the "
            "model a fast tokenizer (tokenizer.json)"
        )


def _absent_processor(name: str) -> str:
    """What a folder lacks of a processor, "" where it is no folder or lacks nothing."""
    folder = Path(name)
    if not folder.is_dir() or any((folder / one).is_file() for one in IMAGE_PROCESSOR):
        return ""
    return (
        f"reads images, and its folder has no image processor ({' or '.join(IMAGE_PROCESSOR)}): copy that file from the model that it was "
        "made of"
    )


def reads_images(config: Any) -> bool:
    """Whether a model of this configuration is loaded as one of images and text."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    own = getattr(config, "auto_map", None) or {}
    return "AutoModelForImageTextToText" in own or type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def _reads_text(config: Any) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    own = getattr(config, "auto_map", None) or {}
    return "AutoModelForCausalLM" in own or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING


def auto_model(config: Any) -> Any:
    """The class of transformers that loads a model of this configuration."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if reads_images(config) else AutoModelForCausalLM


def decoder_of(model: Any) -> Any:
    """The model without its head, whose last hidden states the head reads, where its family keeps it; None: there is none."""
    return family_of(getattr(model, "config", None)).decoder(model)
