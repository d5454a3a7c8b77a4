"""A reference stands somewhere in the answer: OCRBench's rule for its short texts (Liu et al. 2023, arXiv 2305.07895).

Case, outer white space and line breaks do not count. OCRBench has another rule for handwritten formulas, where no white space counts.
"""

from __future__ import annotations

from collections.abc import Sequence

NAME = "contains"


def score(given: str, references: Sequence[str]) -> float:
    """1 or 0; an empty reference is in no answer."""
    said = _plain(given)
    return float(any(text in said for reference in references if (text := _plain(reference))))


def _plain(text: str) -> str:
    return text.lower().strip().replace("\n", " ")
