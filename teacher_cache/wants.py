"""What the teacher must compute of a row: the value that a field declares, and that teachers read. Nothing of it is stored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from teacher_cache.errors import KdcliError

ROW_KINDS = ("vision", "response", "text")
HEADS = ("mean", "each")
"""Of attention: their mean, or each of them, which says the mean too."""


class Sampling(NamedTuple):
    """How rows are sampled: the sampler, ids or draws of a row, the seed of all rows (``teachers/sampling.py``)."""

    sampler: str
    size: int
    seed: int


@dataclass(frozen=True)
class Wants:
    """Signals that a field encodes; ``TeacherOutput`` has one attribute for each.

    ``a | b`` is what serves both, ``a <= b`` whether b serves a.

    Attributes:
        hidden: row kinds whose hidden states after the final norm are wanted.
        topk: row kind → how many of the largest log-probs.
        sampled: row kind → how it is sampled.
        attention: decoder layer → ``each`` head or their ``mean``: what text tokens pay vision tokens there.
        gram: products of the raw logits of all vision tokens with each other.
        features: what the language model is given at the vision tokens.
    """

    hidden: AbstractSet[str] = frozenset()
    topk: Mapping[str, int] = field(default_factory=dict)
    sampled: Mapping[str, Sampling] = field(default_factory=dict)
    attention: Mapping[int, str] = field(default_factory=dict)
    gram: bool = False
    features: bool = False

    def __post_init__(self) -> None:
        for name, kind in (("hidden", frozenset), ("topk", dict), ("sampled", dict), ("attention", dict)):
            object.__setattr__(self, name, kind(getattr(self, name)))
        if unknown := {*self.hidden, *self.topk, *self.sampled}.difference(ROW_KINDS):
            raise KdcliError(f"unknown row kind {min(unknown)!r} is wanted: choose from {', '.join(ROW_KINDS)}")
        if unknown := set(self.attention.values()).difference(HEADS):
            raise KdcliError(f"attention of {min(unknown)!r} heads is wanted: choose from {', '.join(HEADS)}")

    def __or__(self, other: Wants) -> Wants:
        for kind, one in self.sampled.items():
            if other.sampled.get(kind, one) != one:
                raise KdcliError(f"{kind} rows cannot be sampled in two ways at once: capture one {kind}_sampled field")
        topk, attention = dict(self.topk), dict(self.attention)
        for kind, k in other.topk.items():
            topk[kind] = max(k, topk.get(kind, 0))
        for layer, heads in other.attention.items():
            attention[layer] = max(heads, attention.get(layer, heads), key=HEADS.index)
        return Wants(
            self.hidden | other.hidden,
            topk,
            {**self.sampled, **other.sampled},
            attention,
            self.gram or other.gram,
            self.features or other.features,
        )

    def __le__(self, other: Wants) -> bool:
        try:
            return self | other == other
        except KdcliError:
            return False

    @staticmethod
    def together(each: Iterable[Wants]) -> Wants:
        """What serves all of them."""
        whole = Wants()
        for one in each:
            whole |= one
        return whole

    @property
    def head_kinds(self) -> frozenset[str]:
        """Kinds of rows that are multiplied with the head."""
        return frozenset({*self.topk, *self.sampled}) | (frozenset(["vision"]) if self.gram else frozenset())

    @property
    def row_kinds(self) -> frozenset[str]:
        """Kinds of rows that something is said of; attention is of pairs of rows."""
        return self.head_kinds | self.hidden | (frozenset(["vision"]) if self.features else frozenset())

    @property
    def layers(self) -> list[int]:
        """Decoder layers whose input is needed."""
        return sorted({*self.attention, *([0] if self.features else [])})

    @property
    def of_images(self) -> bool:
        """Whether a teacher that reads text alone has nothing to say."""
        return "vision" in self.row_kinds or bool(self.attention)

    def without_samples(self) -> Wants:
        """Samples can be drawn from hidden states later, in any way."""
        return replace(self, sampled={})


NOTHING = Wants()
