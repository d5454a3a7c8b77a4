"""Relaxed accuracy of ChartQA (Masry et al. 2022, arXiv 2203.10244, section 5.1), as Pix2Struct's public metric computes it.

A number may be off by 5 % of the reference; everything else must be equal but for case and outer white space. A number with a percent
sign is that number over 100, in answer and reference alike: ``0.1`` is right for ``10%``, and ``10`` is not. A reference of zero has no
5 %: it is compared as text.
"""

from __future__ import annotations

from collections.abc import Sequence

NAME = "relaxed_accuracy"

MAX_CHANGE = 0.05


def score(given: str, references: Sequence[str]) -> float:
    """1 or 0: the best of the references."""
    return float(any(_fits(given.strip(), reference.strip()) for reference in references))


def _fits(given: str, reference: str) -> bool:
    said, meant = number(given), number(reference)
    if said is not None and meant:
        return abs(said - meant) / abs(meant) <= MAX_CHANGE
    return given.lower() == reference.lower()


def number(text: str) -> float | None:
    """``"12"`` → 12.0, ``"12%"`` → 0.12; None: not a number (thousands separators and units are none either)."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
