"""Whether a model's embedding has a row for every token id that it will be given; asked of configurations, before any weights are read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from teacher_cache.errors import CompatibilityError
from teacher_cache.families import family_of


def embedding_rows(config: Any) -> int:
    return int(config.get_text_config().vocab_size)


def check_token_ids(tokenizer: Any, config: Any) -> None:
    """CompatibilityError with both numbers where a token that every row may have stands beyond the embedding."""
    rows = embedding_rows(config)
    for what, number, fix in _token_ids(tokenizer, config):
        if isinstance(number, int) and number >= rows:
            token = tokenizer.convert_ids_to_tokens(number)
            said = f"{what} has id {number}" if token is None else f"{what} {token!r} has id {number}"
            raise CompatibilityError(
                f"{tokenizer.name_or_path}: {said}, and the model's embedding has {rows} rows (ids 0 to {rows - 1}): {fix}"
            )


def _token_ids(tokenizer: Any, config: Any) -> Iterator[tuple[str, Any, str]]:
    """(what it is, its id, the fix)"""
    bigger = "enlarge the model with `resize_token_embeddings` and save it"
    for name in ("pad", "eos", "bos"):
        fix = f"name another {name}_token in tokenizer_config.json, or {bigger}"
        yield f"the tokenizer's {name} token", getattr(tokenizer, f"{name}_token_id", None), fix
    text = config.get_text_config()
    yield "pad_token_id of config.json", getattr(text, "pad_token_id", None), f"set another one there, or {bigger}"
    if family_of(config).embeds_image_token:
        fix = f"set image_token_id in config.json to the one that the model was trained with, or {bigger}"
        yield "the image token", getattr(config, "image_token_id", None), fix
