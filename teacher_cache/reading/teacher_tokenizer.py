"""The teacher's tokenizer out of a cache."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from teacher_cache.errors import CacheError
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.whole_file import naming_file


def tokenizer_of(cache: TeacherCache) -> Any:
    """The teacher's tokenizer, from the cache itself; None where no field stored it."""
    for body in cache.fields.values():
        folder = body["teacher_folder"]
        names = [name for name in cache.processor_files(folder) if name.startswith(("tokenizer", "special_tokens"))]
        if "tokenizer.json" in names:
            with tempfile.TemporaryDirectory() as copied:
                for name in names:
                    data = cache.processor_file(folder, name)
                    with naming_file(Path(copied) / name):
                        (Path(copied) / name).write_bytes(data)
                return loaded_tokenizer(copied, f"{cache.storage}/{folder}/processor")
    return None


def loaded_tokenizer(copied: str, place: str) -> Any:
    """CacheError naming ``place`` where the library does not take the files, whatever it raises."""
    from transformers import PreTrainedTokenizerFast

    try:
        return PreTrainedTokenizerFast.from_pretrained(copied)
    except BaseException as error:  # the tokenizers library panics, too
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise CacheError(f"{place}: no tokenizer ({type(error).__name__}: {error}): run `kdcli cache verify`") from None
