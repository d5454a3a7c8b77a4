"""Named tensors ↔ the bytes of one tar member: the safetensors layout (length, JSON header, raw little-endian buffers).

Chosen because any user can open a member with ``safetensors.torch.load``, nothing in it can run code, and the header costs
about 70 bytes a tensor.
"""

from __future__ import annotations

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from teacher_cache.errors import CacheError

EXTENSION = "safetensors"


def pack(tensors: dict[str, torch.Tensor]) -> bytes:
    """Deterministic bytes of named CPU tensors."""
    return save({name: tensors[name].contiguous() for name in sorted(tensors)})


def unpack(data: bytes, place: str = "a cache member") -> dict[str, torch.Tensor]:
    """The tensors of ``pack``; CacheError naming ``place`` where the bytes are not of that layout."""
    try:
        return load(data)
    except (SafetensorError, ValueError, TypeError, KeyError, OverflowError, MemoryError, RuntimeError) as error:
        raise CacheError(f"{place} is not readable ({error}): run `kdcli cache verify`") from None
