"""Multiple choice: the letter that an answer names (ScienceQA, MMBench, MMMU, AI2D).

Read off in this order, as LLaVA's ScienceQA script does where it has no options to compare with: the whole answer is a letter; it
begins with a letter and ``.``, ``)`` or ``:``; it says "answer is X". Anything else names no letter and is wrong; no language model is
asked what was meant, as MMBench's own script does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

NAME = "mcq"

_WHOLE = re.compile(r"\(?([A-Za-z])\)?[.:]?")
_START = re.compile(r"\(?([A-Z])[.):](?:\s|$)|\(([A-Z])\)")
_SAID = re.compile(r"\b[Aa]nswer(?: is|:)\s*:?\s*\(?([A-Z])\b")


def letter(text: str) -> str | None:
    """``"(b)"``, ``"B."``, ``"B. a circle"``, ``"The answer is B"`` → ``"B"``; None: it names no letter."""
    text = text.strip()
    found = _WHOLE.fullmatch(text) or _START.match(text) or _SAID.search(text)
    return next(group for group in found.groups() if group).upper() if found else None


def score(given: str, references: Sequence[str]) -> float | None:
    """1 or 0; None where no reference names a letter."""
    wanted = {letter(reference) for reference in references} - {None}
    return float(letter(given) in wanted) if wanted else None
