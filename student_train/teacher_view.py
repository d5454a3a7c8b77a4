"""What a method sees of the teacher: distributions and relations, whichever fields serve them.

A method names needs; ``serve`` picks the fields of the cache that meet each need, best first, before any model loads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from student_train.cache import Cache
from student_train.stream import TrainBatch
from teacher_cache.errors import CompatibilityError
from teacher_cache.records import TopK
from teacher_cache.teachers.head import head_logits

SERVED_BY: dict[str, tuple[tuple[str, str], ...]] = {
    "response_logits": (
        ("response_hidden", ""),
        ("response_topk", "top-k with an exact tail bucket: a lower bound of the KL"),
    ),
    "vision_logits": (
        ("vision_hidden", ""),
        ("vision_topk", "top-k with an exact tail bucket: a lower bound of the KL"),
    ),
    "vision_relation": (("relation", ""), ("vision_hidden", "")),
}
"""Need → fields that serve it alone, best first, with what is lost."""


@dataclass(frozen=True)
class Served:
    """Which field serves each need; ``notes`` are for the user's eyes."""

    fields: Mapping[str, str]
    notes: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        return sorted(set(self.fields.values()))


def serve(needs: Iterable[str], available: Iterable[str], method: str, cache: str) -> Served:
    """Match needs with fields; CompatibilityError naming what is missing and the command that adds it."""
    have = set(available)
    fields: dict[str, str] = {}
    notes: list[str] = []
    for need in sorted(needs):
        choices = SERVED_BY[need]
        found = [(name, loss) for name, loss in choices if name in have]
        if not found:
            raise CompatibilityError(
                f"{cache}: method {method} needs {need}, served by {' or '.join(name for name, _ in choices)}; the cache has "
                f"{', '.join(sorted(have)) or 'no field'}: add one with `kdcli cache-teacher --fields {choices[0][0]} …` on the same --out"
            )
        # A field that is read anyway costs no further bytes.
        chosen, loss = next(((n, x) for n, x in found if n in fields.values()), found[0])
        fields[need] = chosen
        if loss:
            notes.append(f"{need} served by {chosen}: {loss}")
    return Served(fields, tuple(notes))


class Distribution(Protocol):
    """The teacher's distributions on some rows ``[R]``."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice) -> Distribution: ...


@dataclass(frozen=True)
class DenseTeacher:
    """Full vocabulary: logits = hidden · headᵀ, made chunk by chunk where they are used. hidden ``[R, D]``, head ``[V, D]``."""

    hidden: torch.Tensor
    head: torch.Tensor

    def __len__(self) -> int:
        return self.hidden.shape[0]

    def __getitem__(self, rows: slice) -> DenseTeacher:
        return DenseTeacher(self.hidden[rows], self.head)

    def logits(self) -> torch.Tensor:
        """float32 ``[R, V]``."""
        return head_logits(self.hidden, self.head)


@dataclass(frozen=True)
class HeadAndTail:
    """The K largest log-probs and one bucket with the exact rest, at temperature 1."""

    topk: TopK
    vocabulary: int

    def __len__(self) -> int:
        return self.topk.ids.shape[0]

    def __getitem__(self, rows: slice) -> HeadAndTail:
        return HeadAndTail(TopK(*(column[rows] for column in vars(self.topk).values())), self.vocabulary)


@dataclass(frozen=True)
class TeacherView:
    """The teacher's side of one micro-batch, aligned with the student's rows.

    Attributes:
        distributions: by row kind (``response``, ``vision``), rows of all samples one after the other.
        relations: float32 Gram matrix ``[N, N]`` of raw vision logits, one a sample (``[0, 0]`` for text-only); None: not asked.
        vocabulary: columns that both sides have; the student's head may hold padding rows beyond them.
    """

    distributions: Mapping[str, Distribution]
    relations: Sequence[torch.Tensor] | None = None
    vocabulary: int | None = None


class TeacherSignals:
    """Builds a ``TeacherView`` of every micro-batch from the fields that serve the run. Holds the teachers' heads, nothing else.

    Args:
        heads: ``[V, D]`` by hidden field; fields of one teacher share one tensor, a field that was added by another teacher has its own.
        vocabulary: columns that the teachers of all fields have.
    """

    def __init__(self, served: Served, heads: Mapping[str, torch.Tensor], vocabulary: int, device: torch.device):
        self.served, self.vocabulary, self.device = served, vocabulary, device
        self.heads = dict(heads)
        self._grams: dict[str, torch.Tensor] = {}

    @classmethod
    def open(cls, cache: Cache, served: Served, device: torch.device) -> TeacherSignals:
        unique: dict[str, torch.Tensor] = {}
        heads = {}
        for name in served.names:
            if name.endswith("_hidden"):
                sha = cache.fields[name]["head_sha256"]
                if sha not in unique:
                    head = cache.teacher_head(name).to(device)
                    unique[sha] = head.to(torch.float32) if device.type == "cpu" else head
                heads[name] = unique[sha]
        widths = {
            min(t["head_width"], t["tokenizer"]["length"]) for n in served.names for t in [cache.fields[n]["teacher"]]
        }
        return cls(served, heads, min(widths, default=0), device)

    def view(self, batch: TrainBatch) -> TeacherView:
        needs = self.served.fields
        kinds = [kind for kind in ("response", "vision") if f"{kind}_logits" in needs]
        distributions = {kind: self._distribution(needs[f"{kind}_logits"], batch.fields) for kind in kinds}
        relations = self._relations(needs["vision_relation"], batch.fields) if "vision_relation" in needs else None
        return TeacherView(distributions, relations, self.vocabulary)

    def _distribution(self, field: str, records: Mapping[str, list[Any]]) -> Distribution:
        rows = records[field]
        if field.endswith("_hidden"):
            head = self.heads[field]
            return DenseTeacher(torch.cat(rows).to(self.device, head.dtype), head)
        columns = zip(*(vars(one).values() for one in rows))
        return HeadAndTail(TopK(*(torch.cat(column).to(self.device) for column in columns)), self.vocabulary)

    def _relations(self, field: str, records: Mapping[str, list[Any]]) -> list[torch.Tensor]:
        rows = [one.to(self.device) for one in records[field]]
        return rows if field == "relation" else [self.gram_of_hidden(field, one) for one in rows]

    def gram_of_hidden(self, field: str, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Y·Yᵀ ``[N, N]`` of raw logits Y = h·Wᵀ, as h·(WᵀW)·hᵀ."""
        if field not in self._grams:
            wide = self.heads[field].to(torch.float32)
            self._grams[field] = wide.T @ wide
        return (hidden_ND @ self._grams[field]) @ hidden_ND.T
