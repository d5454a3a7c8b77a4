"""ANLS, average normalised Levenshtein similarity of DocVQA, InfographicVQA and ST-VQA (Biten et al. 2019, arXiv 1905.13648, eq. 1).

1 − edit distance / length of the longer text, the best over the references, and 0 where that is below 0.5. Case and runs of white space do
not count. At exactly 0.5 the paper's formula says 0 and the benchmarks' evaluation script keeps 0.5; this follows the script.
"""

from __future__ import annotations

from collections.abc import Sequence

NAME = "anls"

THRESHOLD = 0.5


def score(given: str, references: Sequence[str]) -> float:
    """0, or 0.5 to 1."""
    best = max(similarity(_plain(given), _plain(reference)) for reference in references)
    return best if best >= THRESHOLD else 0.0


def similarity(a: str, b: str) -> float:
    """1 − edit distance / longer length; 1 for two empty texts."""
    longer = max(len(a), len(b))
    return 1.0 - edit_distance(a, b) / longer if longer else 1.0


def edit_distance(a: str, b: str) -> int:
    """Fewest insertions, deletions and substitutions of one character (Levenshtein 1966), one row of the table at a time."""
    before = list(range(len(b) + 1))
    for i, one in enumerate(a, 1):
        row = [i]
        for j, other in enumerate(b, 1):
            row.append(min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (one != other)))
        before = row
    return before[-1]


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
