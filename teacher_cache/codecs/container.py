"""Named tensors ↔ the bytes of one tar member: the safetensors layout (length, JSON header, raw little-endian buffers).

Chosen because any user can open a member with ``safetensors.torch.load``, nothing in it can run code, and the header costs
about 70 bytes a tensor.
"""

from __future__ import annotations

import json

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from teacher_cache.errors import CacheError

EXTENSION = "safetensors"
METADATA = "__metadata__"
MOST_HEADER = 1 << 20
"""Bytes that say which tensors there are: some thousand names."""


def pack(tensors: dict[str, torch.Tensor]) -> bytes:
    """Deterministic bytes of named CPU tensors."""
    return save({name: tensors[name].contiguous() for name in sorted(tensors)})


def unpack(data: bytes, place: str = "a cache member") -> dict[str, torch.Tensor]:
    """The tensors of ``pack``; CacheError naming ``place`` where the bytes are not of that layout."""
    try:
        if int.from_bytes(data[:8], "little") > MOST_HEADER:
            raise ValueError(f"a header of more than {MOST_HEADER:,} bytes")
        return load(data)
    except (SafetensorError, ValueError, TypeError, KeyError, OverflowError, MemoryError, RuntimeError) as error:
        raise CacheError(f"{place} is not readable ({error}): run `kdcli cache verify`") from None


def said_bytes(data: bytes) -> int:
    """How many bytes a container has, by its header.

    Args:
        data: the first ``MOST_HEADER`` bytes of it, or all.

    Raises:
        CacheError: they are no header, or one that is longer than that.
    """
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or not 2 <= length <= MOST_HEADER - 8 or len(data) < 8 + length:
        raise CacheError(f"a header of {length:,} bytes, at most {MOST_HEADER:,} are read: it is damaged, or cut off")
    try:
        header = json.loads(data[8 : 8 + length])
        return 8 + length + max((one["data_offsets"][1] for name, one in header.items() if name != METADATA), default=0)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
        raise CacheError("its header names no tensors: it is damaged") from None
