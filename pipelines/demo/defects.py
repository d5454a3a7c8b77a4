"""Defects that real mixtures have, put into written rows on purpose, so that ``kdcli doctor`` has something to find."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

DEFECTS = ("truncated_image", "missing_image", "empty_answer", "placeholder_mismatch", "duplicate_id")


@dataclass(frozen=True)
class WrittenRow:
    """A row as it goes to disk: PNG bytes a picture (``None``: the file is never written)."""

    id: str
    conversations: list[dict[str, str]]
    source: str
    images: tuple[bytes | None, ...] = ()
    family: str | None = None


@dataclass
class Injector:
    """Damages ``count`` of ``rows`` rows, the kinds in turn; ``done`` says which row got what."""

    rows: int
    count: int
    seed: int
    done: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        chosen = random.Random(f"defects/{self.seed}").sample(range(self.rows), min(self.count, self.rows))
        self._kind = {row: DEFECTS[i % len(DEFECTS)] for i, row in enumerate(chosen)}
        self._first_id: str | None = None

    def apply(self, index: int, row: WrittenRow) -> WrittenRow:
        """The row, damaged if its turn has come. Picture defects fall back to an empty answer on text-only rows."""
        kind = self._kind.get(index)
        if kind in ("truncated_image", "missing_image", "placeholder_mismatch") and not row.images:
            kind = "empty_answer"
        if kind == "duplicate_id" and self._first_id is None:
            kind = "empty_answer"
        self._first_id = self._first_id or row.id
        if kind is None:
            return row
        self.done.setdefault(kind, []).append(index)
        return self._damaged(kind, row)

    def _damaged(self, kind: str, row: WrittenRow) -> WrittenRow:
        if kind == "truncated_image":
            return replace(row, images=tuple(data and data[: len(data) // 2] for data in row.images))
        if kind == "missing_image":
            return replace(row, images=(None,) * len(row.images))
        if kind == "duplicate_id":
            return replace(row, id=self._first_id or row.id)
        said = [dict(turn) for turn in row.conversations]
        if kind == "empty_answer":
            said[-1]["value"] = ""
        else:
            said[0]["value"] = "<image>\n" + said[0]["value"]
        return replace(row, conversations=said)
