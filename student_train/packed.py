"""A micro-batch on its way out of a loader process: all its tensors in one.

PyTorch hands every tensor of a batch over as shared memory of its own, and a batch of cached rows has hundreds of small ones. Packed, it is
one piece of shared memory and a list of where each tensor lies in it.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from typing import Any

import torch

ALIGNED = 64
"""Bytes: every tensor begins at a multiple."""


@dataclass(frozen=True)
class Packed:
    """body: what was packed, pickled without the numbers of its tensors; data: those, uint8."""

    body: bytes
    data: torch.Tensor


class _Packer(pickle.Pickler):
    def __init__(self, file: io.BytesIO):
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[tuple[int, torch.Tensor]] = []
        self.end = 0

    def persistent_id(self, one: Any) -> Any:
        if type(one) is not torch.Tensor:
            return None
        start = self.end
        if one.numel():  # strides of an empty one may be anything, and then it has no bytes to view
            self.tensors.append((start, one.contiguous().reshape(-1).view(torch.uint8)))
        self.end += -(-one.numel() * one.element_size() // ALIGNED) * ALIGNED
        return start, one.dtype, tuple(one.shape)


class _Unpacker(pickle.Unpickler):
    def __init__(self, packed: Packed):
        super().__init__(io.BytesIO(packed.body))
        self._data = packed.data

    def persistent_load(self, told: Any) -> torch.Tensor:
        start, dtype, shape = told
        count = 1
        for size in shape:
            count *= size
        return self._data[start : start + count * dtype.itemsize].view(dtype).view(shape)


def pack(batch: Any) -> Packed:
    """CPU tensors anywhere inside ``batch``; one that stands in it twice is stored twice."""
    body = io.BytesIO()
    packer = _Packer(body)
    packer.dump(batch)
    data = torch.empty(packer.end, dtype=torch.uint8)
    for start, numbers in packer.tensors:
        data[start : start + len(numbers)] = numbers
    return Packed(body.getvalue(), data)


def unpack(packed: Packed) -> Any:
    """What ``pack`` was given; its tensors share one piece of memory."""
    return _Unpacker(packed).load()
