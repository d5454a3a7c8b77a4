"""What makes two preparations the same: the tokenizer, the chat template and the image processor, by hash; and the version of our own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from teacher_cache.errors import CompatibilityError

PREPARATION = 2
"""How rows become tokens and pixels. 1: content of a chat always as parts, never with the tokenizer's own first token, and EXIF orientation
not applied."""


def preparation_version(preparation: Mapping[str, Any], place: object = "the cache") -> int:
    """Of a plan; CompatibilityError where a later kdcli made it."""
    version = int(preparation.get("version", 1))
    if not 1 <= version <= PREPARATION:
        raise CompatibilityError(
            f"{place}: its rows were prepared by version {version}, and this kdcli prepares by versions 1 to {PREPARATION}: "
            "use the kdcli that made it, or a later one"
        )
    return version


def processor_fingerprint(processor: Any) -> dict[str, Any]:
    """``{"tokenizer": {"sha256", "length"}, "chat_template": hash, "image_processor": {…}}``; the last of a model that reads images."""
    tokenizer = processor.tokenizer
    images = processor.image_processor
    return {
        "tokenizer": {"sha256": tokenizer_hash(tokenizer), "length": len(tokenizer)},
        "chat_template": _template_hash(getattr(processor, "chat_template", None) or tokenizer.chat_template or ""),
        **({"image_processor": image_processor_fingerprint(images)} if images is not None else {}),
    }


def is_text_alone(fingerprint: Mapping[str, Any]) -> bool:
    """Whether a fingerprint that holds a processor's (of a teacher, or a plan's preparation) is of a model that reads text alone."""
    return "tokenizer" in fingerprint and "image_processor" not in fingerprint


def _template_hash(template: str | Mapping[str, str]) -> str:
    """Some models have several by name."""
    return text_hash(template if isinstance(template, str) else json.dumps(template, sort_keys=True))


def text_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash of what turns text into ids: the fast tokenizer's own description, without truncation and padding state."""
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    description.pop("truncation", None)
    description.pop("padding", None)
    return text_hash(json.dumps(description, sort_keys=True))


def image_processor_fingerprint(image_processor: Any) -> dict[str, Any]:
    """Class (its name carries the backend), settings and library version: PIL and torchvision pixels differ measurably."""
    import transformers

    settings = {k: v for k, v in image_processor.to_dict().items() if k not in ("processor_class", "_processor_class")}
    return {
        "class": type(image_processor).__name__,
        "settings": text_hash(json.dumps(settings, sort_keys=True, default=str)),
        "transformers": transformers.__version__,
    }
