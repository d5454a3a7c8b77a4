"""What a method sees of the teacher: distributions, relations and affinities, whichever fields serve them (``needs.serve``)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from student_train.dataset import TrainBatch
from student_train.distributions import (
    DenseTeacher,
    Distribution,
    FullVocabulary,
    HeadAndSketch,
    HeadAndTail,
    SampledTeacher,
    SketchTeacher,
    likeliest,
)
from student_train.needs import ONE_FIELD, Served
from teacher_cache.models.low_rank import LowRankHead
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.records import TextTokens
from teacher_cache.signal_records import Coded


@dataclass(frozen=True)
class TeacherView:
    """The teacher's side of one micro-batch, aligned with the student's rows.

    Attributes:
        distributions: by row kind (``response``, ``vision``), rows of all samples one after the other.
        relations: float32 Gram matrix ``[N, N]`` of raw vision logits, one a sample (``[0, 0]`` for text-only); None: not asked.
        vocabulary: columns that both sides have; the student's head may hold padding rows beyond them.
        raw_vision: raw vision logits ``[R_vision]`` of all samples; None: not asked.
        hidden: by row kind, float32 hidden states ``[R, D_t]`` of all samples; only kinds that a need asks for.
        text: text tokens of each sample as the teacher read them.
        matched: bool ``[R_vision]`` of the student, one a sample: rows that have a teacher row; None: all have (no matching).
        self_teacher: by row kind, what the student's own weights say in the gradient-free pass.
        of_samples: by need that one field serves (``needs.ONE_FIELD``), its record of each sample, as its ``decode`` gives it.
    """

    distributions: Mapping[str, Distribution]
    relations: Sequence[torch.Tensor] | None = None
    vocabulary: int | None = None
    raw_vision: FullVocabulary | None = None
    hidden: Mapping[str, torch.Tensor] = field(default_factory=dict)
    text: Sequence[TextTokens] = ()
    matched: Sequence[torch.Tensor] | None = None
    self_teacher: Mapping[str, Distribution] = field(default_factory=dict)
    of_samples: Mapping[str, Sequence[torch.Tensor]] = field(default_factory=dict)

    @property
    def affinities(self) -> Sequence[torch.Tensor] | None:
        """float32 ``[R_vision, N_text]`` cosines of hidden states, one a sample; None: not asked."""
        return self.of_samples.get("vision_text_affinity")


class _Restored(Mapping[str, list[Any]]):
    """The records of a batch by field; those that are only read (``Coded``) become numbers when they are asked for, on the device."""

    def __init__(self, records: Mapping[str, list[Any]], fields: Mapping[str, Any], device: torch.device):
        self._records, self._fields, self._device = records, fields, device
        self._made: dict[str, list[Any]] = {}

    def __getitem__(self, name: str) -> list[Any]:
        if name not in self._made:
            rows = self._records[name]
            coded = bool(rows) and isinstance(rows[0], Coded)
            self._made[name] = self._fields[name].restore(rows, self._device) if coded else rows
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)


class TeacherHeads:
    """Builds a ``TeacherView`` of every micro-batch from the fields that serve the run. Holds the teachers' heads, nothing else.

    Args:
        heads: field → ``[V, D]`` of a field of hidden states, ``LowRankHead`` of a sketched one; fields of one teacher share one tensor, a
            field that was added by another teacher has its own.
        vocabulary: columns that the teachers of all fields have.
        fields: those whose records may come ``Coded``.
    """

    def __init__(
        self,
        served: Served,
        heads: Mapping[str, torch.Tensor | LowRankHead],
        vocabulary: int,
        device: torch.device,
        fields: Mapping[str, Any] | None = None,
    ):
        self.served, self.vocabulary, self.device, self.fields = served, vocabulary, device, dict(fields or {})
        self.heads = dict(heads)
        self._grams: dict[str, torch.Tensor] = {}

    @classmethod
    def open(cls, cache: TeacherCache, served: Served, device: torch.device) -> TeacherHeads:
        unique: dict[str, torch.Tensor] = {}
        heads: dict[str, torch.Tensor | LowRankHead] = {}
        for name in (one for one in served.names if one.endswith("_hidden")):
            if cache.fields[name]["params"]["codec"] == "sketch":
                heads[name] = cache.low_rank_head(name).to(device)
                continue
            sha = cache.fields[name]["head_sha256"]
            if sha not in unique:
                head = cache.teacher_head(name).to(device)
                unique[sha] = head.to(torch.float32) if device.type == "cpu" else head
            heads[name] = unique[sha]
        widths = {
            min(t["head_width"], t["tokenizer"]["length"]) for n in served.names for t in [cache.fields[n]["teacher"]]
        }
        opened = {name: cache.open_field(name) for name in served.names}
        restoring = {name: one for name, one in opened.items() if hasattr(one, "restore")}
        return cls(served, heads, min(widths, default=0), device, restoring)

    def view(self, batch: TrainBatch) -> TeacherView:
        records = _Restored(batch.fields, self.fields, self.device)
        needs = self.served.fields
        kinds = [kind for kind in ("response", "vision") if f"{kind}_logits" in needs]
        distributions = {kind: self._distribution(needs[f"{kind}_logits"], records) for kind in kinds}
        relations = self._relations(needs["vision_relation"][0], records) if "vision_relation" in needs else None
        raw = self._raw_vision(distributions, records) if "vision_raw_logits" in needs else None
        hidden = {
            kind: self._join(records[f"{kind}_hidden"]).to(torch.float32)
            for kind in ("response", "vision")
            if f"{kind}_hidden" in needs
        }
        of_samples = {
            need: [row.to(self.device) for row in records[one.field]]
            for need, one in ONE_FIELD.items()
            if need in needs
        }
        return TeacherView(
            distributions,
            relations,
            self.vocabulary,
            raw,
            hidden,
            batch.text,
            of_samples=of_samples,
        )

    def likeliest(self, batch: TrainBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Of every response row the teacher's likeliest token, int64 ``[R]``, and its probability, float32 ``[R]``."""
        return likeliest(self.of_response(batch.fields))

    def of_response(self, records: Mapping[str, list[Any]]) -> Distribution:
        """What serves ``response_likeliest``, of the response rows of some samples. records: by field."""
        return self._distribution(
            self.served.fields["response_likeliest"], _Restored(records, self.fields, self.device)
        )

    def _distribution(self, fields: tuple[str, ...], records: Mapping[str, list[Any]]) -> Distribution:
        parts = {name.split("_")[1]: self._join(records[name]) for name in fields}
        topk: Any = parts.get("topk")
        hidden: Any = parts.get("hidden")
        head = next((self.heads[name] for name in fields if name in self.heads), None)
        if isinstance(head, LowRankHead):
            return HeadAndSketch.of(topk, hidden, head) if topk is not None else SketchTeacher(hidden, head)
        if head is not None:
            return DenseTeacher(hidden.to(head.dtype), head)
        if topk is not None:
            return HeadAndTail(topk, self.vocabulary)
        sampled: Any = parts["sampled"]
        return SampledTeacher(sampled, self.vocabulary)

    def _join(self, rows: list[Any]) -> Any:
        """A field's records of all samples as one, on the device."""
        if isinstance(rows[0], torch.Tensor):
            return torch.cat(rows).to(self.device)
        return type(rows[0]).join(rows).to(self.device)

    def _raw_vision(self, made: Mapping[str, Distribution], records: Mapping[str, list[Any]]) -> FullVocabulary:
        """The distributions themselves where the same fields serve both."""
        needs = self.served.fields
        same = needs["vision_raw_logits"] == needs.get("vision_logits")
        whole: Any = made["vision"] if same else self._distribution(needs["vision_raw_logits"], records)
        return whole

    def _relations(self, field: str, records: Mapping[str, list[Any]]) -> list[torch.Tensor]:
        rows = [one.to(self.device) for one in records[field]]
        return [self.gram_of_hidden(field, one) for one in rows] if field in self.heads else rows

    def gram_of_hidden(self, field: str, hidden: Any) -> torch.Tensor:
        """Y·Yᵀ ``[N, N]`` of raw logits Y = h·Wᵀ, as h·(WᵀW)·hᵀ; of a sketch, without touching V either."""
        head = self.heads[field]
        if isinstance(head, LowRankHead):
            return head.gram(hidden)
        if field not in self._grams:
            wide = head.to(torch.float32)
            self._grams[field] = wide.T @ wide
        return (hidden @ self._grams[field]) @ hidden.T
