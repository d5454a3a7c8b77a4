"""Top-k under calibrated frequencies, through one entropy coder; quantised finely enough to be exact for every loss (`docs/fidelity.md`).

Ids or their places in the row before (``codecs.repeats``); log-probs as falling differences on a scale that is finest at p = 1; the tail
as its log odds (``codecs.scales``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
import torch
from torch.nn.functional import logsigmoid

from teacher_cache.codecs import entropy, repeats
from teacher_cache.codecs.entropy import Columns, Decoder, open_record
from teacher_cache.codecs.entropy_tables import Table, fit_smooth_table, fit_table
from teacher_cache.codecs.scales import LogOdds, LogScale, Uniform
from teacher_cache.errors import CacheError, KdcliError
from teacher_cache.fields.calibration import Calibration, tables_of, tensors_of
from teacher_cache.signal_records import TopK

TABLES = {"tail_odds", "log_z", "value.0", "ids"}
"""What every calibration holds."""
LOG_Z = Uniform(1 / 32)
"""Only anchors the head's raw logits, k of V; half a step is 0.016 nats."""
ID_PRIOR = 0.5
"""Counts given to every id of the vocabulary, seen in calibration or not."""


class CodedTopK:
    """Without ``calibration`` it can only ``fit`` one."""

    def __init__(self, name: str, k: int, step: float, calibration: Mapping[str, torch.Tensor] | None):
        self.name, self.k = name, k
        self._known = tables_of(calibration) if calibration is not None else None
        if self._known is not None and (lacking := TABLES - set(self._known)):
            raise CacheError(f"field {name}: its calibration lacks {', '.join(sorted(lacking))}")
        self._scale, self._odds = LogScale(step), LogOdds(step / 2)

    @property
    def _tables(self) -> dict[str, Table]:
        if self._known is None:
            raise KdcliError(f"field {self.name}: top-k needs its calibration")
        return self._known

    @property
    def _repeats(self) -> bool:
        """Whether the calibration found it cheaper to point at the row before."""
        return "near.0" in self._tables

    @cached_property
    def _columns(self) -> Columns:
        """Of every stream but ``ids``, in the order they are written."""
        k = min(self.k, self._tables["ids"].escape)
        kinds = ("value", "near") if self._repeats else ("value",)
        names = ["tail_odds", "log_z", *(f"{kind}.{place}" for kind in kinds for place in range(k))]
        return Columns([self._tables[table_name(name)] for name in names])

    def encode(self, topk: TopK) -> dict[str, torch.Tensor]:
        symbols = self._symbols(topk, self._repeats)
        vocabulary = self._tables["ids"].escape
        if len(topk) and int(topk.ids.max()) >= vocabulary:
            raise KdcliError(f"field {self.name}: id {topk.ids.max()} is beyond the {vocabulary} of its calibration")
        streams = [(one, self._tables[table_name(name)]) for name, one in symbols.items()]
        return {"coded": entropy.encode(streams, len(topk))}

    def _symbols(self, topk: TopK, repeat: bool) -> dict[str, np.ndarray]:
        """Stream → int64 symbols, in the order they are written. repeat: ids that the row before had are places in it."""
        values = self._scale.quantise(-topk.log_probs)
        falls = torch.cat([values[:, :1], values.diff(dim=1).clamp_min(0)], dim=1).numpy()
        odds = self._odds.quantise(topk.log_tail - topk.log_probs.logsumexp(dim=1)).numpy()
        places = {f"value.{place}": falls[:, place] for place in range(falls.shape[1])}
        named = {"tail_odds": odds, "log_z": LOG_Z.quantise(topk.log_z).numpy(), **places}
        ids = topk.ids.numpy()
        if not repeat:
            return {**named, "ids": ids}
        near = repeats.find(ids)
        columns = {f"near.{place}": near[:, place] for place in range(near.shape[1])}
        return {**named, **columns, "ids": ids[near == near.shape[1]]}

    def fit(self, topk: TopK, vocabulary: int) -> Calibration:
        """The cheaper of the two ways to write ids, on these rows."""
        ways = [self._fit_tables(topk, vocabulary, repeat) for repeat in (False, True)]
        _, tables = min(ways, key=lambda way: way[0])
        return Calibration(tensors_of(tables), rows=len(topk))

    def _fit_tables(self, topk: TopK, vocabulary: int, repeat: bool) -> tuple[float, dict[str, Table]]:
        """(bits of the calibration rows, tables). Rows follow one another as in the cache, but for the first of a sample."""
        pooled: dict[str, list[np.ndarray]] = {}
        for name, symbols in self._symbols(topk, repeat).items():
            pooled.setdefault(table_name(name), []).append(symbols.reshape(-1))
        seen = {name: np.concatenate(each) for name, each in pooled.items()}
        k = topk.ids.shape[1]
        tables = {
            name: fit_table(one, 0, k) if name.startswith("near") else fit_smooth_table(one)
            for name, one in seen.items()
            if name != "ids"
        }
        tables["ids"] = fit_table(seen["ids"], 0, vocabulary - 1, np.full(vocabulary, ID_PRIOR))
        return sum(tables[name].bits(one) for name, one in seen.items()), tables

    def decode_many(self, stored: Sequence[Mapping[str, torch.Tensor]]) -> tuple[TopK, list[int]]:
        """Of several records, one after the other, and the rows of each: what is not reading symbols is done once for all."""
        columns, ids = zip(*(self._read(open_record(one, f"field {self.name}")) for one in stored))
        joined = np.concatenate(columns, axis=1).astype(np.int64)
        vocabulary = self._tables["ids"].escape
        k = min(self.k, vocabulary)
        odds, log_z = self._odds.restore(torch.from_numpy(joined[0])), LOG_Z.restore(torch.from_numpy(joined[1]))
        log_probs = -self._scale.restore(torch.from_numpy(joined[2 : 2 + k].cumsum(axis=0).T))
        fresh = np.concatenate(ids).astype(np.int64)
        # A record's first row has no repeats, so that records resolve one after the other as one.
        each = repeats.resolve(joined[2 + k :].T, fresh) if self._repeats else fresh.reshape(-1, k)
        if each.size and not 0 <= int(each.min()) <= int(each.max()) < vocabulary:
            raise CacheError(f"field {self.name}: a record holds an id beyond the vocabulary: run `kdcli cache verify`")
        head = normalised(torch.from_numpy(each), log_probs, logsigmoid(odds), logsigmoid(-odds), log_z)
        return head, [one.shape[1] for one in columns]

    def _read(self, decoder: Decoder) -> tuple[np.ndarray, np.ndarray]:
        """int32 columns ``[streams, R]``, and the ids that are no repeats."""
        rows, k = decoder.rows, min(self.k, self._tables["ids"].escape)
        columns = decoder.take_all(self._columns.layout(rows))
        count = rows * k
        if self._repeats:
            new = columns[2 + k :] == k
            if rows and not new[:, 0].all():
                raise CacheError("a coded record's repeated ids do not fit together: run `kdcli cache verify`")
            count = int(np.count_nonzero(new))
        ids = decoder.take(count, self._tables["ids"])
        decoder.finish()
        return columns, ids


def normalised(
    ids: torch.Tensor, log_probs: torch.Tensor, log_tail: torch.Tensor, log_head: torch.Tensor, log_z: torch.Tensor
) -> TopK:
    """Ids and log-probs ``[R, K]``, the latter known up to a constant a row; log mass of tail and head, log Z ``[R]``."""
    log_probs = log_probs.to(torch.float32)
    log_probs = log_probs - log_probs.logsumexp(dim=1, keepdim=True) + log_head[:, None]
    return TopK(ids.to(torch.int64), log_probs, log_tail, log_z)


def table_name(stream: str) -> str:
    """The table of a stream: places of the head share one with their octave (1 | 2-3 | 4-7 | …)."""
    kind, _, place = stream.partition(".")
    return f"{kind}.{int(place).bit_length()}" if place else stream
