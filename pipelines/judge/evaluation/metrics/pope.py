"""POPE: does the model see objects that are not there (Li et al. 2023, arXiv 2305.10355, section 5; its public evaluate.py).

An answer is "no" where its first sentence has the word no or not, else "yes"; so is a reference, of which the first word must be yes
or no. "yes" is the positive class. Questions with other references do not count.
"""

from __future__ import annotations

from collections.abc import Sequence

NAME = "pope"


def says_yes(text: str) -> bool:
    """The first sentence, without commas and case, has neither ``no`` nor ``not``."""
    words = text.partition(".")[0].replace(",", "").lower().split()
    return not {"no", "not"} & set(words)


def wanted(references: Sequence[str]) -> bool | None:
    """True: yes; False: no; None: no question of this kind."""
    words = references[0].replace(",", " ").replace(".", " ").lower().split()
    return words[0] == "yes" if words and words[0] in ("yes", "no") else None


def score(given: str, references: Sequence[str]) -> float | None:
    """1 or 0."""
    meant = wanted(references)
    return None if meant is None else float(says_yes(given) == meant)


def summary(answers: Sequence[tuple[str, Sequence[str]]]) -> dict[str, float]:
    """Accuracy, precision, recall, F1 and the share of yes; a quotient without a denominator is 0."""
    counted = [(says_yes(given), meant) for given, references in answers if (meant := wanted(references)) is not None]
    if not counted:
        return {}
    said = sum(yes for yes, _ in counted)
    positives = sum(meant for _, meant in counted)
    hits = sum(yes and meant for yes, meant in counted)
    return {
        "pope_accuracy": sum(yes == meant for yes, meant in counted) / len(counted),
        "pope_precision": hits / max(1, said),
        "pope_recall": hits / max(1, positives),
        "pope_f1": 2 * hits / max(1, said + positives),
        "pope_yes_ratio": said / len(counted),
    }
