"""What a page says before anything else: one sentence, its figures, and what they rest on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Lead:
    """sentence: what the page shows. figures: (number, what it is). facts: (name, text), as ``("Cost", …)``."""

    sentence: str
    figures: Sequence[tuple[str, str]]
    facts: Sequence[tuple[str, str]] = ()

    def text(self) -> str:
        """For a terminal."""
        return "\n".join([self.sentence, *(f"{name}: {told}" for name, told in self.facts)])
