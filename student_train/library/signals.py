"""What the teacher says at the positions of one batch, read when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any
from weakref import WeakValueDictionary

import torch

from student_train.dataset import TrainBatch
from student_train.distributions import Distribution, HeadAndTail, is_full
from student_train.needs import Served
from student_train.packed import Packed, pack, unpack
from student_train.teacher_view import TeacherHeads, TeacherView
from teacher_cache.errors import CompatibilityError, KdcliError, without_secrets
from teacher_cache.models.head import CHUNK_BYTES, chunk_rows
from teacher_cache.reading.cache import TeacherCache

KINDS = ("response", "vision")
ANSWER = "answer"


class SignalSource:
    """The heads that signals are made with. Pickled it is an address: loader processes neither read nor send any head.

    Args:
        url: of the cache. served: need → fields that serve it. cache: where it is open already.
    """

    def __init__(self, url: str, served: Mapping[str, tuple[str, ...]], cache: TeacherCache | None = None):
        self.url, self.served, self._cache = url, Served(served, ()), cache
        self._heads: dict[str, TeacherHeads] = {}
        _SOURCES[_name(url, served)] = self

    def heads(self, device: torch.device | str) -> TeacherHeads:
        """Read once a device."""
        place = str(device)
        if place not in self._heads:
            self._heads[place] = TeacherHeads.open(
                self._cache or TeacherCache(self.url), self.served, torch.device(device)
            )
        return self._heads[place]

    def __str__(self) -> str:
        return without_secrets(self.url)

    def __reduce__(self) -> tuple[Any, ...]:
        return _source, (self.url, dict(self.served.fields))


_SOURCES: WeakValueDictionary[str, SignalSource] = WeakValueDictionary()
"""Of this process, as long as a dataset, collator or batch holds them."""


def _name(url: str, served: Mapping[str, tuple[str, ...]]) -> str:
    return f"{url}\n{sorted(served.items())}"


def _source(url: str, served: Mapping[str, tuple[str, ...]]) -> SignalSource:
    return _SOURCES.get(_name(url, served)) or SignalSource(url, served)


@dataclass(frozen=True, eq=False)
class TeacherSignals:
    """The teacher's side of one batch. Rows of all samples stand one after the other: R of a kind in all.

    Kinds: ``response``, the positions that predict a response token (so row r speaks of ``labels[r]``), and ``vision``, the vision
    tokens themselves. What is asked for must be in the ``needs`` (or the method's) that the dataset was made for.

    Attributes:
        batch: keys, positions, labels and records, without the student's inputs, which are the rest of the collated batch.
        device: where signals are made; ``to`` gives the same batch on another one. Records stay on the CPU until they are read.
        number: of the batch in its stream; None: it comes from none.
    """

    source: SignalSource
    batch: TrainBatch
    device: str = "cpu"
    number: int | None = None

    # ---- which rows

    @property
    def keys(self) -> tuple[str, ...]:
        """Row keys of the samples."""
        return self.batch.batch.keys

    @property
    def filler(self) -> bool:
        """Whether the batch counts for nothing: its process has no sample left in a step that another one still has one for."""
        return self.batch.filler

    @property
    def refused(self) -> tuple[str, ...]:
        """A line for every row that was left out, since the student's processor does not take it."""
        return self.batch.refused

    @property
    def labels(self) -> torch.Tensor:
        """int64 ``[R_response]``: the token ids that the response rows predict."""
        return self.batch.batch.labels.to(self.device)

    def positions(self, kind: str = "response") -> torch.Tensor:
        """int64 ``[R]``: where the rows stand in the student's ``[B·T]``: ``logits.flatten(0, 1)[positions]`` are its rows.

        Kind ``answer``: the response tokens themselves, one place behind ``response``.
        """
        rows = self.batch.batch.rows
        if not rows:
            raise KdcliError("positions are the student's: read the rows by a dataset with a processor")
        return rows[_kind(kind, (*KINDS, ANSWER))].to(self.device)

    def counts(self, kind: str = "response") -> tuple[int, ...]:
        """How many rows belong to each sample."""
        return self.batch.batch.counts[_kind(kind, (*KINDS, ANSWER))]

    # ---- what the teacher says there

    @cached_property
    def view(self) -> TeacherView:
        """All that a method sees of the teacher."""
        return self.source.heads(self.device).view(self.batch)

    def distribution(self, kind: str = "response") -> Distribution:
        """What ``kdcli.losses`` take: one row's distribution a row, whichever fields it is stored in; needs ``KIND_logits``."""
        if _kind(kind) not in self.view.distributions:
            raise self._not_asked(f"{kind}_logits")
        return self.view.distributions[kind]

    def log_probs(self, kind: str = "response", temperature: float = 1.0) -> torch.Tensor:
        """float32 ``[R, V]``, natural logarithms, V columns of the teacher's vocabulary; needs ``KIND_logits``.

        R × V numbers at once: losses take ``distribution``, chunk by chunk.

        Raises:
            CompatibilityError: top-k or samples alone serve the need, which do not know every token.
        """
        found: Any = self.distribution(kind)
        if not is_full(found):
            raise CompatibilityError(
                f"{self.source}: {kind} rows are stored as {', '.join(self.source.served.fields[f'{kind}_logits'])} alone, which does "
                "not know every token: ask top_k, or add hidden states with `kdcli cache add-field`"
            )
        return found.log_probs(temperature)

    def top_k(self, k: int, kind: str = "response") -> tuple[torch.Tensor, torch.Tensor]:
        """(ids int64 ``[R, k]``, log-probs float32 ``[R, k]``), the likeliest first, at temperature 1; needs ``KIND_logits``.

        Raises:
            CompatibilityError: the cache holds fewer than k, or samples.
        """
        found: Any = self.distribution(kind)
        if is_full(found):
            step = chunk_rows(found.head_rows, CHUNK_BYTES)
            best = [found[at : at + step].log_probs().topk(k, dim=1) for at in range(0, max(1, len(found)), step)]
            return torch.cat([one.indices for one in best]), torch.cat([one.values for one in best])
        if isinstance(found, HeadAndTail) and k <= found.topk.ids.shape[1]:
            return found.topk.ids[:, :k], found.topk.log_probs[:, :k].to(torch.float32)
        held = f"the {found.topk.ids.shape[1]} likeliest" if isinstance(found, HeadAndTail) else "samples"
        raise CompatibilityError(f"{self.source}: {kind} rows are stored as {held}, top_k was asked for {k}")

    def hidden(self, kind: str = "response") -> torch.Tensor:
        """float32 ``[R, D_t]``: post-final-norm hidden states; needs ``KIND_hidden``."""
        if _kind(kind) not in self.view.hidden:
            raise self._not_asked(f"{kind}_hidden")
        return self.view.hidden[kind]

    @property
    def affinity(self) -> list[torch.Tensor]:
        """float32 ``[R_vision, R_response]`` a sample: cosines of hidden states at vision tokens and at the response tokens themselves
        (``positions("answer")``); needs ``vision_text_affinity``. Prompts' tokens, where the field has them: ``view.affinities``."""
        if self.view.affinities is None:
            raise self._not_asked("vision_text_affinity")
        return [one[:, text.response.to(one.device)] for one, text in zip(self.view.affinities, self.batch.text)]

    def records(self, field: str) -> list[Any]:
        """What field ``field`` holds of each sample, as its ``decode`` gives it; fields of other packages, too."""
        if field not in self.batch.fields:
            read = ", ".join(sorted(self.batch.fields)) or "none"
            raise KdcliError(f"{self.source}: field {field} was not read (read: {read}): name it in fields")
        return self.batch.fields[field]

    def _not_asked(self, need: str) -> KdcliError:
        asked = ", ".join(sorted(self.source.served.fields)) or "nothing"
        return KdcliError(f"{self.source}: {need} was not asked for (asked: {asked}): name it in needs")

    # ---- where it is

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TeacherSignals:
        """The same signals, made on another device when they are read."""
        return replace(self, device=str(device))

    def pin_memory(self) -> TeacherSignals:
        """Its records in one piece of page-locked memory: ``DataLoader(pin_memory=True)`` calls this."""
        packed = pack(self.batch)
        return replace(self, batch=unpack(Packed(packed.body, packed.data.pin_memory())))

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpacked, (self.source, pack(self.batch), self.device, self.number)


def _unpacked(source: SignalSource, packed: Packed, device: str, number: int | None) -> TeacherSignals:
    return TeacherSignals(source, unpack(packed), device, number)


def _kind(kind: str, kinds: Sequence[str] = KINDS) -> str:
    if kind not in kinds:
        raise KdcliError(f"no kind of rows {kind!r}: choose from {', '.join(kinds)}")
    return kind
