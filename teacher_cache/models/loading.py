"""Around what loads a model: whatever transformers, its tokenizers or safetensors raise, or panic with, becomes one line."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from teacher_cache.errors import KdcliError, is_panic, not_loaded, one_line, out_of_memory

PROBES = (
    "What is in the picture? Two dogs, 3 cats and 12.5 % of a cow.\n\n  It's über-nice: 你好, مرحبا \U0001f600 <image>\t</s>",
    *(letter * 64 + "!" for letter in ("a", "A", " ", "\n", "0", "é", "你", "-")),
    "a b" * 64 + "!",
)
"""Texts on which a regular expression that backtracks without end shows itself."""


@contextmanager
def naming_what_fails(what: str) -> Iterator[None]:
    """Around the loading of a model's processor, configuration or weights: KdcliError of one line for anything that they raise.

    A Rust library that panics (a tokenizer's regular expression) writes to the terminal itself; that is held back.
    """
    with _terminal_held() as held:
        try:
            yield
        except KdcliError:
            raise
        except BaseException as error:
            if is_panic(error):
                held.clear()
                raise KdcliError(
                    f"{what} cannot be loaded (one of its files breaks the library that reads it: {one_line(error)[:300]}): "
                    "download its tokenizer.json and weights again from the model's source"
                ) from None
            if not isinstance(error, Exception):
                raise
            if out_of_memory(error):
                raise KdcliError(
                    f"{what} does not fit into memory ({one_line(error)[:200]}): use a machine with more, or --dtype bfloat16"
                ) from None
            raise not_loaded(what, error) from None


def try_tokenizer(tokenizer: Any) -> None:
    """Cut a few texts, so that a tokenizer that cannot do it says so before any row."""
    for text in PROBES:
        tokenizer(text)


def attending(config: Any, asked: str) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` with which the attention that was asked for counts, also where ``config.json`` names another:
    transformers would first want that one's package."""
    config._attn_implementation = asked
    return {"config": config, "attn_implementation": asked}


class _Held:
    """What was written to the terminal meanwhile."""

    def __init__(self, file: Any):
        self._file = file

    def clear(self) -> None:
        self._file.truncate(0)


@contextmanager
def _terminal_held() -> Iterator[_Held]:
    """File descriptor 2 goes to a file, and from there to where it went, unless it is cleared."""
    with suppress(OSError, ValueError):
        sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield _Held(file)
        finally:
            with suppress(OSError, ValueError):
                sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            if said := file.read():
                os.write(2, said)
