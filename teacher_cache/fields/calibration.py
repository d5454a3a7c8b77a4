"""What a field learns from a few hundred captured samples before the job starts: entropy tables, bases, a low-rank head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from teacher_cache.codecs.entropy_tables import Table
from teacher_cache.errors import CacheError


@dataclass(frozen=True)
class Calibration:
    """One field's calibration, committed beside the cache before any worker starts.

    Attributes:
        tensors: what encoding and decoding need. rows: rows it was fitted on.
        low_rank_head: ``weight`` bfloat16 ``[V, r]`` and ``bias`` float32 ``[V]`` where the field is a sketch: all that training loads
            of the teacher.
    """

    tensors: dict[str, torch.Tensor]
    rows: int
    low_rank_head: dict[str, torch.Tensor] = field(default_factory=dict)


def tensors_of(tables: Mapping[str, Table]) -> dict[str, torch.Tensor]:
    """Tables as named tensors: ``table.NAME`` float32 ``[A]`` and ``low.NAME`` int64 ``[1]``."""
    stored = {f"table.{name}": table.probabilities for name, table in tables.items()}
    return {**stored, **{f"low.{name}": torch.tensor([table.low]) for name, table in tables.items()}}


def tables_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, Table]:
    """The tables of a calibration file; CacheError where one is none."""
    names = [name.removeprefix("table.") for name in tensors if name.startswith("table.")]
    lows = {name: tensors.get(f"low.{name}") for name in names}
    if any(low is None or low.numel() != 1 or low.dtype != torch.int64 for low in lows.values()):
        raise CacheError("a calibration holds a table that does not say where it begins: it is damaged")
    return {name: Table(int(low), tensors[f"table.{name}"]) for name, low in lows.items() if low is not None}
