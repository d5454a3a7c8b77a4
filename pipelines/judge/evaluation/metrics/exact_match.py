"""Exact match: the answer is one of the references, but for case, outer white space and a final full stop.

kdcli's own; GQA's public evaluation (Hudson and Manning 2019, arXiv 1902.09506) compares as it does, with answers that were lower-cased.
"""

from __future__ import annotations

from collections.abc import Sequence

NAME = "exact_match"


def normalise(text: str) -> str:
    """Case, outer white space and a final full stop do not count."""
    return text.strip().rstrip(".").strip().lower()


def score(given: str, references: Sequence[str]) -> float:
    """1 or 0."""
    return float(normalise(given) in map(normalise, references))
