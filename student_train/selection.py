"""Selective distillation: how much every row counts for a term, by what the cache or an outside column says of it.

A setting is ``SOURCE``, ``SOURCE:NUMBER`` or a column, and behind it ``/mean`` or ``/least`` where a sample is to count as a whole:

- ``confidence``: the probability of the teacher's likeliest token; ``confidence:P``: 1 where it is at least P, else 0.
- ``agreement``: 1 where the teacher's likeliest token is the label, else 0.
- ``unless-contradicted:P``: 0 where the teacher gives another token than the label at least P, else 1.
- ``column:NAME``: a number in a column of the mixture. ``file:PATH:NAME``: one of a .parquet or .jsonl file, by its column ``key``; or a
  list of them, one for each answer of the row.

The first three and such lists are of response tokens. Terms on vision rows and on whole samples take the mean over the sample's response
tokens, or the least of them. The student takes no part in any: weights are known before the step, and the same however it is cut
(``losses/counted.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from student_train.dataset import TrainBatch
from student_train.losses.counted import TermWeights, Weights
from student_train.needs import Need
from student_train.sample_columns import Column, answer_lengths, read_column
from teacher_cache.errors import KdcliError

NEED = Need("response_likeliest")
FORMS = "confidence, confidence:P, agreement, unless-contradicted:P, column:NAME, file:PATH:NAME, each also with /mean or /least"
Likeliest = Callable[[TrainBatch], tuple[torch.Tensor, torch.Tensor]]
"""micro-batch → of every response row the teacher's likeliest token, int64 ``[R]``, and its probability, float32 ``[R]``."""


@dataclass(frozen=True)
class Tokens:
    """What is known of the response tokens of a micro-batch: ``[R]`` each."""

    labels: torch.Tensor
    likeliest: torch.Tensor
    probability: torch.Tensor


def confidence(tokens: Tokens, least: float | None) -> torch.Tensor:
    return tokens.probability if least is None else tokens.probability >= least


def agreement(tokens: Tokens, least: float | None) -> torch.Tensor:
    return tokens.likeliest == tokens.labels


def unless_contradicted(tokens: Tokens, least: float | None) -> torch.Tensor:
    return (tokens.likeliest == tokens.labels) | (tokens.probability < (least or 0.0))


SOURCES: Mapping[str, Callable[[Tokens, float | None], torch.Tensor]] = {
    "confidence": confidence,
    "agreement": agreement,
    "unless-contradicted": unless_contradicted,
}
NUMBERED = {"confidence": (False, True), "agreement": (False,), "unless-contradicted": (True,)}
"""Whether a number may, or must, stand behind a source."""


@dataclass(frozen=True)
class Selector:
    """One setting. source: of ``SOURCES``, with its number; or a column. whole: "", ``mean`` or ``least``."""

    text: str
    source: str = ""
    number: float | None = None
    column: Column | None = None
    whole: str = ""

    def weights(self, batch: TrainBatch, tokens: Tokens | None, device: torch.device) -> TermWeights:
        """Of the rows of a micro-batch."""
        counts = list(batch.batch.counts["response"])
        if self.column:
            return self._of_column(batch, counts, device)
        assert tokens is not None, "only columns do without the teacher"
        each = SOURCES[self.source](tokens, self.number).to(torch.float32)
        return self._given(each, torch.stack([_of_sample(one, self.whole) for one in each.split(counts)]), counts)

    def _of_column(self, batch: TrainBatch, counts: list[int], device: torch.device) -> TermWeights:
        assert self.column
        each, samples = [], []
        for number, value in enumerate(batch.columns[self.column.text]):
            listed = isinstance(value, tuple)
            lengths = answer_lengths(batch.student_text[number]) if listed else [counts[number]]
            given = torch.tensor(value, dtype=torch.float32)
            each.append(given.reshape(-1).repeat_interleave(torch.tensor(lengths, dtype=torch.int64)))
            samples.append(_of_sample(each[-1], self.whole) if listed else given)
        return self._given(torch.cat(each).to(device), torch.stack(samples).to(device), counts)

    def _given(self, tokens: torch.Tensor, samples: torch.Tensor, counts: list[int]) -> TermWeights:
        """tokens ``[R]``, samples ``[B]``: where a sample counts as a whole, its tokens weigh what it does."""
        repeated = torch.tensor(counts, device=samples.device)
        return TermWeights(samples.repeat_interleave(repeated) if self.whole else tokens, samples)


def _of_sample(tokens: torch.Tensor, whole: str) -> torch.Tensor:
    """A sample without a response token has nothing against it."""
    if not len(tokens):
        return tokens.new_ones(())
    return tokens.min() if whole == "least" else tokens.mean()


def parse_selector(term: str, text: str) -> Selector:
    """KdcliError of one line that names the term and the forms."""
    place = f"select of {term}: {text!r}"
    given, slash, whole = text.rpartition("/")
    if not slash or whole not in ("mean", "least"):
        given, whole = text, ""
    source, _, rest = given.partition(":")
    if source in ("column", "file") and rest:
        return Selector(text, column=read_column(given, place), whole=whole)
    if source not in SOURCES or bool(rest) not in NUMBERED[source]:
        raise KdcliError(f"{place} is not one of {FORMS}")
    try:
        number = float(rest) if rest else None
    except ValueError:
        number = math.nan
    if number is not None and not 0 < number <= 1:
        raise KdcliError(f"{place}: its number is a probability, above 0 and at most 1")
    return Selector(text, source, number, whole=whole)


def needs_of(selection: Mapping[str, Selector]) -> frozenset[Need]:
    """What the settings must know of the teacher."""
    return frozenset({NEED} if any(not one.column for one in selection.values()) else ())


def columns_of(selection: Mapping[str, Selector]) -> list[Column]:
    return list({one.column.text: one.column for one in selection.values() if one.column}.values())


def weigher(
    selection: Mapping[str, Selector], likeliest: Likeliest, device: torch.device
) -> Callable[[TrainBatch], Weights]:
    """micro-batch → its rows' weights, by term."""
    asks = bool(needs_of(selection))

    @torch.no_grad()
    def weigh(batch: TrainBatch) -> Weights:
        tokens = Tokens(batch.batch.labels.to(device), *likeliest(batch)) if asks else None
        return {term: one.weights(batch, tokens, device) for term, one in selection.items()}

    return weigh


def check_columns(selection: Mapping[str, Selector], keys: Callable[[], Iterable[str]], parts: Sequence[str]) -> None:
    """Every row that a stage reads has its number in every file; KdcliError naming the first that has none, or where all are 0."""
    for column in (one for one in columns_of(selection) if one.values is not None):
        column.check(keys(), f"part {', '.join(parts)}")
