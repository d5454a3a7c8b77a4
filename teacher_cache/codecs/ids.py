"""Token ids ``[R, K]``, K distinct ones a row, in one of two orders.

- ``rank``: rows keep their order (by falling log-prob), every id in ⌈log2 V⌉ bits. Values beside them stay monotone and code well.
- ``sorted``: ids ascend inside a row and are stored as differences, in byte planes under zstd. Fewer bytes for the ids where K is large,
  but values must follow the permutation and are monotone no more.

Ids that are not below V raise: they are never masked.
"""

from __future__ import annotations

import numpy as np
import torch

from teacher_cache.codecs import frame
from teacher_cache.codecs.bits import pack_bits, unpack_bits, width_of
from teacher_cache.errors import CacheError, KdcliError


class RankOrder:
    """Bit-packed as they are."""

    NAME = "rank"
    VERSION = 1

    @staticmethod
    def encode(ids: torch.Tensor, vocabulary: int) -> torch.Tensor:
        """uint8 ``[⌈R·K·⌈log2 V⌉ / 8⌉]``."""
        _check(ids, vocabulary)
        return pack_bits(ids, width_of(vocabulary))

    @staticmethod
    def decode(data: torch.Tensor, rows: int, k: int, vocabulary: int) -> torch.Tensor:
        """int64 ``[R, K]``."""
        return _known(unpack_bits(data, width_of(vocabulary), rows * k).view(rows, k), vocabulary)


class SortedOrder:
    """Differences in byte planes, zstd level 1."""

    NAME = "sorted"
    VERSION = 1

    @staticmethod
    def encode(ids: torch.Tensor, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(uint8 bytes, permutation int64 ``[R, K]``): ``values.gather(1, permutation)`` is in the order that ``decode`` gives."""
        _check(ids, vocabulary)
        ascending, permutation = ids.sort(dim=1)
        # The first id itself, then the gap to the next, less the 1 that distinct ids differ by anyway.
        gaps = torch.diff(ascending, dim=1, prepend=ascending.new_full((len(ids), 1), -1)) - 1
        if bool((gaps < 0).any()):
            row = int((gaps < 0).any(dim=1).nonzero()[0])
            raise KdcliError(f"row {row} holds an id twice: ids of a row must be distinct to be stored sorted")
        planes = gaps.numpy().astype("<u4").T.reshape(-1, 1).view(np.uint8)[:, : _planes(vocabulary)].T
        framed = frame.compress(np.ascontiguousarray(planes).tobytes())
        return torch.from_numpy(np.frombuffer(framed, np.uint8).copy()), permutation

    @staticmethod
    def decode(data: torch.Tensor, rows: int, k: int, vocabulary: int) -> torch.Tensor:
        """int64 ``[R, K]``, ascending inside a row."""
        size = rows * k * _planes(vocabulary)
        raw = frame.decompress(data.numpy().tobytes(), "sorted ids", most=size)
        if len(raw) != size:
            raise CacheError(
                f"sorted ids of {len(raw)} bytes where {rows} rows of {k} take {size}: run `kdcli cache verify`"
            )
        split = np.zeros((rows * k, 4), dtype=np.uint8)
        split[:, : _planes(vocabulary)] = np.frombuffer(raw, np.uint8).reshape(_planes(vocabulary), -1).T
        gaps = torch.from_numpy(split.view("<u4").reshape(k, rows).T.astype(np.int64))
        return _known((gaps + 1).cumsum(dim=1) - 1, vocabulary)


def _planes(vocabulary: int) -> int:
    """Bytes that an id of this vocabulary has."""
    return -(-width_of(vocabulary) // 8)


def _check(ids: torch.Tensor, vocabulary: int) -> None:
    if ids.numel() and (int(ids.max()) >= vocabulary or int(ids.min()) < 0):
        wrong = int(ids.max()) if int(ids.max()) >= vocabulary else int(ids.min())
        raise KdcliError(f"id {wrong} is not of a vocabulary of {vocabulary}")


def _known(ids: torch.Tensor, vocabulary: int) -> torch.Tensor:
    if ids.numel() and int(ids.max()) >= vocabulary:
        raise CacheError(
            f"a stored id {int(ids.max())} is not of the vocabulary of {vocabulary}: run `kdcli cache verify`"
        )
    return ids
