"""What fields say of their bytes before any teacher has spoken: guesses, where nothing was measured."""

from __future__ import annotations

from typing import Any

from teacher_cache.errors import KdcliError
from teacher_cache.fields import Field
from teacher_cache.fields.guess import TABLE_BYTES

DEFAULT, ROUGH = "default, ±40 %", "default, rough"


def default_basis(one: Field) -> str:
    return DEFAULT if one.calibrated else ROUGH


def default_bytes(one: Field, vocabulary: int, heads: int = 1) -> float:
    """Bytes of a coded row; KdcliError where the field does not tell."""
    guess: Any = getattr(one, "guess_bytes", None)
    if guess is None:
        raise KdcliError(
            f"field {one.name}: its bytes depend on the teacher's output, and there is no default: "
            "cache a few hundred rows with it and name that cache with --like"
        )
    return float(guess(vocabulary, heads))


def default_files(one: Field, width: int, vocabulary: int) -> dict[str, int]:
    """Bytes of the files that a calibrated field writes once, by role: ``calibration``, ``low_rank_head``."""
    guess: Any = getattr(one, "guess_files", None)
    return dict(guess(width, vocabulary)) if guess else {"calibration": 4 * vocabulary + TABLE_BYTES}
