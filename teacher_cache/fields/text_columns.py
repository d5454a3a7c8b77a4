"""Which of a sample's text tokens a record of ``affinity`` holds: runs of them, beside the stored columns."""

from __future__ import annotations

from itertools import pairwise

import torch

from teacher_cache.codecs import entropy
from teacher_cache.errors import CacheError
from teacher_cache.records import Prepared


def response_columns(prepared: Prepared, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(int64 ``[n]``: which of a sample's N text tokens are of a response, int32 for ``columns_of``)."""
    flags = torch.zeros(tokens + 2, dtype=torch.int8)
    flags[1:-1] = prepared.text.response
    turns = flags.diff().nonzero().reshape(-1) if bool(flags.any()) else torch.zeros(2)
    return flags[1:-1].nonzero().reshape(-1), torch.cat([torch.tensor([tokens]), turns]).to(torch.int32)


def columns_of(text: torch.Tensor) -> torch.Tensor:
    """int64 ``[n]``: the stored text tokens among N.

    Args:
        text: int32 ``[1 + 2·runs]``: N, start and stop of each run of them; N alone where all are stored, and 0, 0 where none is.

    Raises:
        CacheError: it is none of these.
    """
    numbers = text.reshape(-1).tolist()
    runs = list(zip(numbers[1::2], numbers[2::2]))
    edges = [edge for run in runs for edge in run] if numbers[1:] != [0, 0] else []
    fits = text.dtype == torch.int32 and len(numbers) % 2 and 0 <= numbers[0] <= entropy.MOST_ROWS
    if not fits or any(a >= b for a, b in pairwise([-1, *edges, numbers[0] + 1])):
        raise CacheError("field affinity: a record's text tokens are damaged: run `kdcli cache verify`")
    if len(numbers) == 1:
        return torch.arange(numbers[0])
    return torch.cat([torch.arange(start, stop) for start, stop in runs])


def spread(cosine: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """``[R, N]`` of the stored columns ``[R, n]``: NaN where a text token is not stored, which no loss lets pass."""
    columns = columns_of(text)
    if len(columns) != cosine.shape[1]:
        raise CacheError(
            f"field affinity: {cosine.shape[1]} columns, {len(columns)} are named: run `kdcli cache verify`"
        )
    if len(columns) == int(text[0]):
        return cosine
    whole = cosine.new_full((len(cosine), int(text[0])), torch.nan)
    whole[:, columns.to(cosine.device)] = cosine
    return whole
