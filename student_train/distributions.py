"""The teacher's distributions on some rows, by what stored them: dense, sketched, a head of likely tokens, samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from student_train.head_correction import corrected
from teacher_cache.models.head import CHUNK_BYTES, chunk_rows, head_logits, log_softmax_in_place, piece_rows
from teacher_cache.models.low_rank import LowRankHead
from teacher_cache.signal_records import Sampled, Sketch, TopK


class Distribution(Protocol):
    """The teacher's distributions on some rows ``[R]``."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any) -> Distribution: ...


class FullVocabulary(Protocol):
    """A distribution with every token's value, made chunk by chunk where it is used. vocabulary: V."""

    @property
    def vocabulary(self) -> int: ...

    @property
    def head_rows(self) -> torch.Tensor:
        """``[V, D]``: logits are linear in some D numbers of the row, up to constants; the same tensor for all rows of a run."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any) -> FullVocabulary: ...

    def logits(self) -> torch.Tensor:
        """float32 ``[R, V]``: raw logits (not normalised)."""
        ...

    def logits_at(self, columns: torch.Tensor) -> torch.Tensor:
        """float32 ``[R, m]``: ``logits()[:, columns]`` without the others; columns int64 ``[m]``, each once."""
        ...

    def log_probs(self, temperature: float = 1.0) -> torch.Tensor:
        """float32 ``[R, V]``: log softmax(logits / temperature)."""
        ...


@torch.no_grad()
def likeliest(teacher: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The likeliest token of each row, int64 ``[R]``, and its probability at temperature 1, float32 ``[R]``; samples alone know neither."""
    if hasattr(teacher, "topk"):
        return teacher.topk.ids[:, 0], teacher.topk.log_probs[:, 0].to(torch.float32).exp()
    rows = chunk_rows(teacher.head_rows, CHUNK_BYTES)
    starts = range(0, max(1, len(teacher)), rows)
    best = [teacher[start : start + rows].log_probs().max(dim=1) for start in starts]
    return torch.cat([one.indices for one in best]), torch.cat([one.values for one in best]).exp()


@dataclass(frozen=True)
class OfLabels:
    """What a teacher says of given tokens, rows ``[R]``, at temperature 1, in nats.

    Attributes:
        likeliest: int64, the likeliest token. log_likeliest: float32, its log-prob.
        log_probs: float32, of the given tokens. known: bool; where it is False the token is none of the K that are stored, and its log-prob
            at most this, that of the K-th.
    """

    likeliest: torch.Tensor
    log_likeliest: torch.Tensor
    log_probs: torch.Tensor
    known: torch.Tensor


@torch.no_grad()
def of_labels(teacher: Any, labels: torch.Tensor) -> OfLabels:
    """labels: int64 ``[R]``. Samples alone know nothing of them."""
    if hasattr(teacher, "topk"):
        ids, log_probs = teacher.topk.ids, teacher.topk.log_probs.to(torch.float32)
        same = ids == labels[:, None]
        known = same.any(dim=1)
        own = torch.where(same, log_probs, -torch.inf).amax(dim=1)
        return OfLabels(ids[:, 0], log_probs[:, 0], torch.where(known, own, log_probs[:, -1]), known)
    rows, found = chunk_rows(teacher.head_rows, CHUNK_BYTES), []
    for start in range(0, max(1, len(teacher)), rows):
        log_probs = teacher[start : start + rows].log_probs()
        best = log_probs.max(dim=1)
        found.append((best.indices, best.values, log_probs.gather(1, labels[start : start + rows, None])[:, 0]))
    likeliest, log_likeliest, own = map(torch.cat, zip(*found))
    return OfLabels(likeliest, log_likeliest, own, torch.ones_like(labels, dtype=torch.bool))


def is_full(teacher: Distribution) -> bool:
    """Whether every token's value is known."""
    return hasattr(teacher, "log_probs")


class _Softmax:
    """``log_probs`` of what has whole logits."""

    def logits(self) -> torch.Tensor:
        raise NotImplementedError

    def log_probs(self, temperature: float = 1.0) -> torch.Tensor:
        return log_softmax_in_place(_cooled(self.logits(), temperature))


def _cooled(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Divided in place; no pass at temperature 1."""
    return logits if temperature == 1.0 else logits.div_(temperature)


@dataclass(frozen=True)
class DenseTeacher(_Softmax):
    """Logits = hidden · headᵀ, capped softly where ``cap`` is given (``HeadForm``). hidden ``[R, D]``, head ``[V, D]``."""

    hidden: torch.Tensor
    head: torch.Tensor
    cap: float | None = None

    @property
    def vocabulary(self) -> int:
        return len(self.head)

    @property
    def head_rows(self) -> torch.Tensor:
        return self.head

    def __len__(self) -> int:
        return self.hidden.shape[0]

    def __getitem__(self, rows: Any) -> DenseTeacher:
        return DenseTeacher(self.hidden[rows], self.head, self.cap)

    def logits(self) -> torch.Tensor:
        return head_logits(self.hidden, self.head, self.cap)

    def logits_at(self, columns: torch.Tensor) -> torch.Tensor:
        return head_logits(self.hidden, self.head[columns], self.cap)


@dataclass(frozen=True)
class SketchTeacher(_Softmax):
    """Logits from a sketch alone: y·W′ᵀ + b + m (codecs/transform.py)."""

    sketch: Sketch
    head: LowRankHead

    @property
    def vocabulary(self) -> int:
        return len(self.head.bias)

    @property
    def head_rows(self) -> torch.Tensor:
        return self.head.weight

    def __len__(self) -> int:
        return self.sketch.coefficients.shape[0]

    def __getitem__(self, rows: Any) -> SketchTeacher:
        return SketchTeacher(self.sketch[rows], self.head)

    def logits(self) -> torch.Tensor:
        return self.head.logits(self.sketch)

    def logits_at(self, columns: torch.Tensor) -> torch.Tensor:
        return self.head.at(columns).logits(self.sketch)


@dataclass(frozen=True)
class HeadAndSketch:
    """Exact log-probs of the K likeliest tokens; all others by the sketch, shifted so that their mass is the exact tail's.

    At T ≠ 1 the temperature is applied after the composition, so the tail's mass is approximate there.
    """

    topk: TopK
    sketch: Sketch
    head: LowRankHead

    @classmethod
    def of(cls, topk: TopK, sketch: Sketch, head: LowRankHead) -> HeadAndSketch:
        """Of a sketch as it was stored: what the head says of its error goes into it."""
        return cls(topk, corrected(sketch, topk, head), head)

    @property
    def vocabulary(self) -> int:
        return len(self.head.bias)

    @property
    def head_rows(self) -> torch.Tensor:
        return self.head.weight

    def __len__(self) -> int:
        return self.topk.ids.shape[0]

    def __getitem__(self, rows: Any) -> HeadAndSketch:
        return HeadAndSketch(self.topk[rows], self.sketch[rows], self.head)

    def logits(self) -> torch.Tensor:
        """Raw: the head's are log-prob + log Z; the others are the sketch's, anchored by the row's mean logit."""
        return self.head.logits(self.sketch).scatter_(1, self.topk.ids, self.topk.log_probs + self.topk.log_z[:, None])

    def logits_at(self, columns: torch.Tensor) -> torch.Tensor:
        values = self.head.at(columns).logits(self.sketch)
        # The place of a column that is not asked for is one past the last.
        place = columns.new_full((self.vocabulary,), len(columns))
        place[columns] = torch.arange(len(columns), device=columns.device)
        wide = torch.cat([values, values.new_empty(len(values), 1)], dim=1)
        return wide.scatter_(1, place[self.topk.ids], self.topk.log_probs + self.topk.log_z[:, None])[:, :-1]

    def log_probs(self, temperature: float = 1.0) -> torch.Tensor:
        tail = self.head.logits(self.sketch)
        # The K columns leave the tail's sum by their values, so that no pass writes over the others.
        tail.scatter_(1, self.topk.ids, -torch.inf)
        log_mass = torch.cat([piece.logsumexp(dim=1) for piece in tail.split(piece_rows(tail))])
        shift = torch.where(log_mass > -torch.inf, self.topk.log_tail - log_mass, 0.0)  # K = V: there is no tail
        composed = tail.add_(shift[:, None]).scatter_(1, self.topk.ids, self.topk.log_probs)
        return composed if temperature == 1.0 else log_softmax_in_place(_cooled(composed, temperature))


@dataclass(frozen=True)
class HeadAndTail:
    """The K largest log-probs and one bucket with the exact rest, at temperature 1."""

    topk: TopK
    vocabulary: int

    def __len__(self) -> int:
        return self.topk.ids.shape[0]

    def __getitem__(self, rows: Any) -> HeadAndTail:
        return HeadAndTail(self.topk[rows], self.vocabulary)


@dataclass(frozen=True)
class SampledTeacher:
    """Unbiased samples of the distribution at temperature 1: for what is linear in the teacher's probabilities."""

    sampled: Sampled
    vocabulary: int

    def __len__(self) -> int:
        return self.sampled.ids.shape[0]

    def __getitem__(self, rows: Any) -> SampledTeacher:
        return SampledTeacher(self.sampled[rows], self.vocabulary)
