"""A method's loss over one micro-batch the plain way: both whole models in float64, dense logits, no cache, chunks or masks of the product.

What a method's terms are given here comes from the live teacher by definitions written out; averages are plain means. Only the terms
themselves are the method's, so any method of the folder can be held to it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import normalize

from student_train.losses.terms import HiddenRows, HiddenTerm, Rows, RowTerm, SampleRows, StudentRows
from student_train.methods import Passes, hook
from student_train.teacher_view import TeacherView
from teacher_cache.preparing.batch import Batch, collate
from teacher_cache.preparing.prepare import Preparer
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.reading.cached_samples import CachedSamples


@dataclass(frozen=True)
class Dense64:
    """A distribution whose logits ``[R, V]`` are all there."""

    values: torch.Tensor

    @property
    def vocabulary(self) -> int:
        return self.values.shape[1]

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: Any) -> Dense64:
        return Dense64(self.values[rows])

    def logits(self) -> torch.Tensor:
        return self.values.clone()

    def logits_at(self, columns: torch.Tensor) -> torch.Tensor:
        return self.values[:, columns]

    def log_probs(self, temperature: float = 1.0) -> torch.Tensor:
        return torch.log_softmax(self.values / temperature, dim=1)


def load64(folder: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()


def in_float64(batch: Batch) -> Batch:
    inputs = {name: one.double() if one.is_floating_point() else one for name, one in batch.inputs.items()}
    return replace(batch, inputs=inputs)


def teacher_batch(cache_url: Path, parts: tuple[str, ...], keys: tuple[str, ...], teacher_parts: Any) -> Batch:
    """Rows of the cache as the teacher reads them, in the order of ``keys``."""
    cache, preparer = TeacherCache(str(cache_url)), Preparer(*teacher_parts)
    rows = CachedSamples(cache, parts, ())
    samples = [rows.read(shard, row).sample for shard, count in enumerate(rows.counts) for row in range(count)]
    by_key = {one.key: one for one in (preparer.prepare(sample, cache.template(sample.part)) for sample in samples)}
    return collate([by_key[key] for key in keys], 0)


@torch.no_grad()
def live_view(model: Any, batch: Batch, vocabulary: int, text: Any) -> TeacherView:
    """Everything that a need can ask for, of every sample."""
    # Padding stands on the right, where no token looks. Masked itself it would be NaN beyond a sliding window, and 0 · NaN in other rows:
    # eager attention rounds the mask of a float64 model to float32, where a row that sees nothing has no finite score.
    inputs = {**batch.inputs, "attention_mask": torch.ones_like(batch.inputs["attention_mask"])}
    out = model(**inputs, use_cache=False, output_attentions=True, output_hidden_states=True)
    states, head = out.hidden_states[-1].flatten(0, 1), model.get_output_embeddings().weight[:vocabulary]
    rows = {kind: states[at] for kind, at in batch.rows.items()}
    split = {kind: one.split(list(batch.counts[kind])) for kind, one in rows.items()}
    raw = [one @ head.T for one in split["vision"]]
    places = {kind: at.split(list(batch.counts[kind])) for kind, at in batch.rows.items()}
    length = batch.inputs["input_ids"].shape[1]
    maps = [
        out.attentions[0][i][:, text_at - i * length][:, :, vision_at - i * length]
        for i, (text_at, vision_at) in enumerate(zip(places["text"], places["vision"]))
    ]
    features = out.hidden_states[0].flatten(0, 1)[batch.rows["vision"]].split(list(batch.counts["vision"]))
    return TeacherView(
        distributions={kind: Dense64(rows[kind] @ head.T) for kind in ("response", "vision")},
        relations=[one @ one.T for one in raw],
        vocabulary=vocabulary,
        raw_vision=Dense64(rows["vision"] @ head.T),
        hidden={kind: rows[kind] for kind in ("response", "vision")},
        text=text,
        of_samples={
            "vision_text_affinity": [
                normalize(v, dim=1) @ normalize(t, dim=1).T for v, t in zip(split["vision"], split["text"])
            ],
            "text_vision_attention": maps,
            "vision_features": list(features),
        },
    )


def reference(
    trainer: Any, one: Any, view: TeacherView, weights: Mapping[str, torch.Tensor] | None = None
) -> tuple[float, dict[str, float], dict[str, torch.Tensor]]:
    """(loss, terms, gradients by parameter) of the trainer's student and method on one micro-batch, which is the whole step.

    Args:
        weights: term → of every value that it averages; none: all alike.
    """
    student = copy.deepcopy(trainer.model).double()
    batch = in_float64(one.batch)
    generator = trainer._generator(0, 0)
    passes = hook(trainer.method, "passes")(0.0, generator) or Passes()
    head = student.head
    if passes.self_teacher:
        with torch.no_grad():
            own = student(batch, trainer.kinds, passes.teacher)
        view = replace(view, self_teacher={kind: Dense64(rows @ head.detach().T) for kind, rows in own.items()})
    hidden = student(batch, trainer.kinds, passes.student)
    rows = replace(student.rows(hidden, batch, one.student_text), head_gram=lambda v: head[:v].T @ head[:v])
    if trainer.matching:
        view = trainer.matching.align(view, rows, one, generator)
    values = {name: plain_mean(term, rows, view, (weights or {}).get(name)) for name, term in trainer.terms.items()}
    loss = sum(term.weight * values[name] for name, term in trainer.terms.items())
    loss.backward()
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    return float(loss.detach()), {name: float(value.detach()) for name, value in values.items()}, gradients


def plain_mean(term: Any, student: StudentRows, view: TeacherView, weights: torch.Tensor | None = None) -> torch.Tensor:
    """The term's mean over what it counts, over whole matrices; with weights Σ w·value / Σ w."""
    values = plain_values(term, student, view)
    return values.mean() if weights is None else (weights * values).sum() / weights.sum()


def plain_values(term: Any, student: StudentRows, view: TeacherView) -> torch.Tensor:
    """Of all that a term averages."""
    if isinstance(term, RowTerm):
        return _values_of_rows(term, student, view)
    if isinstance(term, HiddenTerm):
        rows = HiddenRows(student.hidden[term.rows], view.hidden[term.rows], student.maps or {})
        kept = torch.cat([_kept(term.rows, i, count, view) for i, count in enumerate(student.counts[term.rows])])
        return term.loss(rows)[kept]
    counts = zip(*([n - term.skip_first * (kind == "vision") for n in student.counts[kind]] for kind in term.rows))
    found = [
        term.loss(SampleRows(number, student, view, term.skip_first))
        for number, each in enumerate(counts)
        if all(count > 0 for count in each)
    ]
    return torch.stack(found)


def _values_of_rows(term: RowTerm, student: StudentRows, view: TeacherView) -> torch.Tensor:
    kind, counts = term.rows, student.counts[term.rows]
    teacher: Mapping[str, Any] = view.distributions
    values = term.loss(
        Rows(
            student.hidden[kind] @ student.head.T,
            student.labels if kind == "response" else None,
            teacher.get(kind),
            view.self_teacher.get(kind),
        )
    ).split(list(counts))
    samples = [
        one[term.skip_first :][_kept(kind, i, len(one), view)[term.skip_first :]] for i, one in enumerate(values)
    ]
    if term.sum_rows:
        return torch.stack([one.sum() for one in samples if len(one)])
    return torch.cat(samples)


def _kept(kind: str, sample: int, count: int, view: TeacherView) -> torch.Tensor:
    """Rows with a teacher row beside them."""
    if kind != "vision" or view.matched is None:
        return torch.ones(count, dtype=torch.bool)
    return view.matched[sample]
