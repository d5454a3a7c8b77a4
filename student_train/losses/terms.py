"""The kinds of terms that a method's loss is made of, and what each sees of both sides.

Losses never know where the teacher's signal came from, nor how rows are chunked, masked or averaged: that is ``reduce.py``'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from student_train.distributions import Distribution
from student_train.losses.divergences import cross_entropy
from student_train.losses.precision import wide
from student_train.needs import ONE_FIELD
from student_train.teacher_view import TeacherView
from teacher_cache.errors import CompatibilityError
from teacher_cache.records import TextTokens


@dataclass(frozen=True)
class Rows:
    """A chunk of C rows of one kind, as a method's loss sees it.

    Attributes:
        logits: ``[C, V]`` of the student. labels: ``[C]`` for response rows, None for other rows.
        teacher: the same rows of the teacher, None where the method needs no logits of this kind.
        self_teacher: the same rows of the gradient-free pass of the student's own weights, None where there is none.
    """

    logits: torch.Tensor
    labels: torch.Tensor | None
    teacher: Distribution | None
    self_teacher: Distribution | None = None

    def need_labels(self) -> torch.Tensor:
        assert self.labels is not None, "only response rows have labels"
        return self.labels

    def need_teacher(self) -> Distribution:
        assert self.teacher is not None, "the method did not declare this need"
        return self.teacher

    def need_self_teacher(self) -> Distribution:
        assert self.self_teacher is not None, "the method did not declare this need"
        return self.self_teacher


def label_loss(rows: Rows) -> torch.Tensor:
    """−log p_s(label) ``[C]``: the cross-entropy of every method, under one name so that a fused kernel may take its place."""
    return cross_entropy(rows.logits, rows.need_labels())


@dataclass(frozen=True)
class HiddenRows:
    """All rows of one kind as hidden states.

    Attributes:
        student: float32 ``[R, D_s]``, with gradient. teacher: float32 ``[R, D_t]``. maps: the method's learned maps.
    """

    student: torch.Tensor
    teacher: torch.Tensor
    maps: Mapping[str, torch.nn.Module]


@dataclass(frozen=True)
class StudentRows:
    """The student's side of a micro-batch.

    Attributes:
        hidden: by row kind ``[R, D]``, with gradient. counts: by kind, rows of each sample.
        head: ``[V, D]``, with gradient where it is trained. labels: ``[R_response]``.
        head_gram: columns V → WᵀW ``[D, D]`` of the head's first V rows (None: all), with gradient where the head is trained;
            only made where a SampleTerm asks.
        maps: the method's learned maps by name. text: text tokens of each sample as the student reads them.
        attentions: one a sample, ``[H, N_text, R_vision]`` of the student's first layer, with gradient; None: not asked.
        cap: c where the model's logits are c · tanh(h·headᵀ / c); None: h·headᵀ.
    """

    hidden: Mapping[str, torch.Tensor]
    counts: Mapping[str, Sequence[int]]
    head: torch.Tensor
    labels: torch.Tensor
    head_gram: Callable[[int | None], torch.Tensor]
    maps: Mapping[str, torch.nn.Module] | None = None
    text: Sequence[TextTokens] = ()
    attentions: Sequence[torch.Tensor] | None = None
    cap: float | None = None

    def of_sample(self, kind: str, number: int) -> torch.Tensor:
        """Hidden states of one sample ``[R_i, D]``; ``features``: what the language model is given at the vision rows."""
        counts = self.counts["vision" if kind == "features" else kind]
        start = sum(counts[:number])
        return self.hidden[kind][start : start + counts[number]]


@dataclass(frozen=True)
class SampleRows:
    """One sample of both sides, as a ``SampleTerm``'s loss sees it; each value is made when it is asked for.

    ``skip_first`` vision rows are left out on both sides. Teacher rows stand in the order of the student's (``alignment.py``).
    """

    number: int
    student: StudentRows
    teacher: TeacherView
    skip_first: int = 0

    def hidden(self, kind: str) -> torch.Tensor:
        """The student's hidden states ``[R, D]`` in the compute dtype, with gradient."""
        rows = self.student.of_sample(kind, self.number)
        return rows[self.skip_first :] if kind == "vision" else rows

    def teacher_gram(self) -> torch.Tensor:
        """Gram matrix of the teacher's raw vision logits, float32 ``[N, N]``."""
        assert self.teacher.relations is not None, "the method did not declare this need (vision_relation)"
        return self.teacher.relations[self.number][self.skip_first :, self.skip_first :]

    def student_gram(self) -> torch.Tensor:
        """The student's, over the vocabulary that both sides have, without ever making its logits."""
        rows = wide(self.hidden("vision"))
        return (rows @ self.student.head_gram(self.teacher.vocabulary)) @ rows.T

    def said(self, need: str) -> torch.Tensor:
        """The record of the field that serves this need (``needs.ONE_FIELD``)."""
        assert need in self.teacher.of_samples, f"the method did not declare this need ({need})"
        one, axis = self.teacher.of_samples[need][self.number], ONE_FIELD[need].vision_axis
        return one if axis is None else one.narrow(axis, self.skip_first, one.shape[axis] - self.skip_first)

    def affinity(self) -> torch.Tensor:
        """The teacher's cosines of vision rows and text tokens, float32 ``[N, N_text]``."""
        return self.said("vision_text_affinity")

    def attention(self) -> torch.Tensor:
        """The teacher's first-layer attention text → vision, float32 ``[H, N_text, N]``; the mean over heads where H is 1."""
        return self.said("text_vision_attention")

    def student_attention(self) -> torch.Tensor:
        """The student's, float32 ``[H_s, N_text, N]``, with gradient."""
        assert self.student.attentions is not None, "the term did not ask for attention"
        return self.student.attentions[self.number][:, :, self.skip_first :]

    def features(self) -> torch.Tensor:
        """What the student's language model is given at its vision rows ``[N, D_s]``, with gradient."""
        assert "features" in self.student.hidden, "the term did not ask for features"
        return self.student.of_sample("features", self.number)[self.skip_first :]

    def teacher_features(self) -> torch.Tensor:
        """The teacher's, float32 ``[N, D_t]``."""
        return self.said("vision_features")

    def maps(self, name: str) -> torch.nn.Module:
        """A learned map of the method."""
        assert self.student.maps is not None and name in self.student.maps, f"the method has no map {name}"
        return self.student.maps[name]

    def matched(self) -> torch.Tensor:
        """bool ``[N]``: the vision rows that have a teacher row."""
        rows = len(self.hidden("vision"))
        if self.teacher.matched is None:
            return torch.ones(rows, dtype=torch.bool, device=self.student.head.device)
        return self.teacher.matched[self.number][self.skip_first :]

    def text_tokens(self, which: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(teacher's, student's) indices of the same text tokens: ``response``, or ``all`` where both read the same text.

        Raises:
            CompatibilityError: ``all``, and the prompts differ (another chat template).
        """
        theirs, ours = self.teacher.text[self.number], self.student.text[self.number]
        device = self.student.head.device
        if which == "response":
            return tuple(torch.nonzero(one.response).flatten().to(device) for one in (theirs, ours))  # type: ignore[return-value]
        if not torch.equal(theirs.ids, ours.ids):
            raise CompatibilityError(
                f"teacher and student read other prompts ({len(theirs.ids)} and {len(ours.ids)} text tokens): "
                "use the response tokens only (text = response), or the teacher's chat template for the student"
            )
        every = torch.arange(len(ours.ids), device=device)
        return every, every


@dataclass(frozen=True)
class RowTerm:
    """weight × mean over rows of ``loss(chunk) -> [C]``.

    rows: ``response``, ``vision`` or ``answer`` (at the response tokens themselves, not shifted).
    skip_first: leave out so many rows at the start of every sample (LLaVA-KD's code drops one vision row).
    sum_rows: sum over the rows of a sample, mean over samples, instead of the mean over all rows.
    """

    weight: float
    rows: str
    loss: Callable[[Rows], torch.Tensor]
    skip_first: int = 0
    sum_rows: bool = False


@dataclass(frozen=True)
class HiddenTerm:
    """weight × mean over rows of ``loss(rows) -> [R]`` on hidden states. rows: ``response`` or ``vision``."""

    weight: float
    rows: str
    loss: Callable[[HiddenRows], torch.Tensor]


@dataclass(frozen=True)
class SampleTerm:
    """weight × mean over samples of ``loss(sample) -> scalar``; a sample counts where it has rows of every kind in ``rows``.

    asks: of ``FIRST_LAYER``, what else the loss looks at.
    """

    weight: float
    loss: Callable[[SampleRows], torch.Tensor]
    rows: tuple[str, ...] = ("vision",)
    skip_first: int = 0
    asks: tuple[str, ...] = ()


FIRST_LAYER = frozenset({"features", "attention"})
"""Kinds that are no hidden states of the last layer: vision features, and what text tokens pay vision tokens."""
Term = RowTerm | HiddenTerm | SampleTerm
Terms = Mapping[str, Term]


def kinds_of(terms: Mapping[str, Any]) -> set[str]:
    """Row kinds that some term looks at: a plain SFT run never gathers vision rows."""
    kinds: set[str] = set()
    for term in terms.values():
        kinds |= {*term.rows, *term.asks} if isinstance(term, SampleTerm) else {term.rows}
    return kinds
