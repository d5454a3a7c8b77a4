"""``vision_topk`` and ``response_topk``: the k largest log-probs with their ids, the exact log tail mass and log Z.

Codings:

- ``coded`` (default): ids under their calibrated frequencies, log-probs as falling differences on a scale that is finest at p = 1
  (``codecs.scales``), the scalars quantised finely enough to be exact for every loss (`docs/fidelity.md`); 15 to 25 bytes a row at k = 8.
- ``plain``: int32 ids, float16 or float32 log-probs, float32 scalars; needs no calibration: 6·k + 8 bytes a row.

The tail mass is never stored as 1 − Σp: on peaked rows it is 1e-6, and rounding would destroy it. ``plain`` keeps its logarithm, ``coded``
its log odds, since on flat rows it is the head's mass that a rounded logarithm would destroy.
Alone it serves forward KL with a tail bucket at temperature 1; with a sketch of the hidden states, the full vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import logsigmoid

from teacher_cache.codecs import entropy, repeats
from teacher_cache.codecs.entropy import Decoder, Table, fit_smooth_table, fit_table, open_record
from teacher_cache.codecs.scales import LogOdds, LogScale, Uniform
from teacher_cache.errors import CacheError, KdcliError
from teacher_cache.fields.calibration import Calibration, tables_of, tensors_of
from teacher_cache.records import Prepared, TeacherOutput, TopK

FIELDS = ("vision_topk", "response_topk")
DTYPES = {"float16": torch.float16, "float32": torch.float32}
CODINGS = ("coded", "plain")
PLAIN = ("ids", "log_probs", "log_tail", "log_z")
TABLES = {"tail_odds", "log_z", "value.0", "ids"}
"""What every calibration holds."""
LOG_Z = Uniform(1 / 32)
"""Only anchors the head's raw logits, k of V; half a step is 0.016 nats."""
ID_PRIOR = 0.5
"""Counts given to every id of the vocabulary, seen in calibration or not."""


@dataclass(frozen=True)
class Params:
    """step: of the log-probs' scale, in nats at p = 1 (``coded``). value_dtype: of the log-probs (``plain``)."""

    k: int = 64
    coding: str = "coded"
    step: float = 1 / 64
    value_dtype: str = "float16"

    def __post_init__(self) -> None:
        if self.k < 1:
            raise KdcliError(f"top-k field: k must be at least 1, got {self.k}")
        for name, choices in (("value_dtype", tuple(DTYPES)), ("coding", CODINGS)):
            if getattr(self, name) not in choices:
                raise KdcliError(
                    f"top-k field: {name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}"
                )
        if not 0 < self.step <= 1:
            raise KdcliError(f"top-k field: step must be in (0, 1], got {self.step}")


class TopKField:
    version = 2
    temperatures: tuple[float, ...] | None = (1.0,)

    def __init__(self, name: str, params: Params, calibration: Mapping[str, torch.Tensor] | None = None):
        self.name = name
        self.rows = name.removesuffix("_topk")
        self.params = asdict(params)
        self.wants = frozenset({f"topk.{self.rows}:{params.k}"})
        self.calibrated = params.coding == "coded"
        self._given, self._calibration = params, calibration
        self._known = tables_of(calibration) if calibration is not None else None
        if self._known is not None and (lacking := TABLES - set(self._known)):
            raise CacheError(f"field {name}: its calibration lacks {', '.join(sorted(lacking))}")
        self._scale, self._odds = LogScale(params.step), LogOdds(params.step / 2)

    def __reduce__(self) -> tuple[Any, ...]:
        return create, (self.name, dict(self.params), self._calibration)

    @property
    def _tables(self) -> dict[str, Table]:
        if self._known is None:
            raise KdcliError(f"field {self.name}: coding = 'coded' needs its calibration")
        return self._known

    @property
    def _repeats(self) -> bool:
        """Whether the calibration found it cheaper to point at the row before."""
        return "near.0" in self._tables

    def encode(self, prepared: Prepared, output: TeacherOutput) -> dict[str, torch.Tensor]:
        given, topk = self._given, cut(output.topk[self.rows], self._given.k)
        if given.coding == "coded":
            return {"coded": entropy.encode(list(self._streams(topk).values()), len(topk))}
        return {
            "ids": topk.ids.to(torch.int32),
            "log_probs": topk.log_probs.to(DTYPES[given.value_dtype]),
            "log_tail": topk.log_tail,
            "log_z": topk.log_z,
        }

    def _symbols(self, topk: TopK, repeat: bool) -> dict[str, np.ndarray]:
        """Stream → int64 symbols, in the order they are written. repeat: ids that the row before had are places in it."""
        values = self._scale.quantise(-topk.log_probs)
        steps = values.diff(dim=1).clamp_min(0)
        odds = self._odds.quantise(topk.log_tail - topk.log_probs.logsumexp(dim=1))
        places = {f"value.{p}": steps[:, p - 1] for p in range(1, values.shape[1])}
        scalars = {"tail_odds": odds, "log_z": LOG_Z.quantise(topk.log_z)}
        named = {name: one.numpy() for name, one in {**scalars, "value.0": values[:, 0], **places}.items()}
        ids = topk.ids.numpy()
        if not repeat:
            return {**named, "ids": ids}
        near = repeats.find(ids)
        columns = {f"near.{place}": near[:, place] for place in range(near.shape[1])}
        return {**named, **columns, "ids": ids[near == near.shape[1]]}

    def _streams(self, topk: TopK) -> dict[str, entropy.Stream]:
        symbols = self._symbols(topk, self._repeats)
        vocabulary = self._tables["ids"].escape
        if len(topk) and int(topk.ids.max()) >= vocabulary:
            raise KdcliError(f"field {self.name}: id {topk.ids.max()} is beyond the {vocabulary} of its calibration")
        return {name: (one, self._tables[table_name(name)]) for name, one in symbols.items()}

    def fit(self, outputs: Sequence[TeacherOutput], head: torch.Tensor) -> Calibration:
        """Frequencies of ids and of all quantised numbers on the calibration rows."""
        topk = TopK.join([cut(one.topk[self.rows], self._given.k) for one in outputs])
        if not len(topk):
            raise KdcliError(f"calibration saw no {self.rows} rows: field {self.name} needs some; use coding = 'plain'")
        ways = [self._fit_tables(topk, len(head), repeat) for repeat in (False, True)]
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

    def with_calibration(self, tensors: Mapping[str, torch.Tensor]) -> TopKField:
        return TopKField(self.name, self._given, tensors)

    def decode(self, stored: dict[str, torch.Tensor]) -> TopK:
        """``TopK`` whose head is renormalised to exactly 1 − e^log_tail, so that rounded log-probs still sum to one."""
        if self._given.coding == "coded":
            ids, log_probs, odds, log_z = self._read(open_record(stored, f"field {self.name}"))
            log_tail, log_head = logsigmoid(odds), logsigmoid(-odds)
        elif set(stored) != set(PLAIN):
            raise CacheError(f"field {self.name}: a record holds {sorted(stored)}")
        else:
            ids, log_probs, log_tail, log_z = (stored[name] for name in PLAIN)
            log_head = torch.log(-torch.expm1(log_tail.clamp(max=-1e-38)))
        log_probs = log_probs.to(torch.float32)
        log_probs = log_probs - log_probs.logsumexp(dim=1, keepdim=True) + log_head[:, None]
        return TopK(ids.to(torch.int64), log_probs, log_tail, log_z)

    def _read(self, decoder: Decoder) -> tuple[torch.Tensor, ...]:
        rows, vocabulary = decoder.rows, self._tables["ids"].escape
        k = min(self._given.k, vocabulary)

        def take(name: str, count: int = rows) -> torch.Tensor:
            return torch.from_numpy(decoder.take(count, self._tables[table_name(name)]).astype(np.int64))

        odds, log_z = self._odds.restore(take("tail_odds")), LOG_Z.restore(take("log_z"))
        steps = torch.stack([take(f"value.{place}") for place in range(k)], dim=1)
        if self._repeats:
            near = torch.stack([take(f"near.{place}") for place in range(k)], dim=1).numpy()
            fresh = take("ids", int((near == k).sum())).numpy()
            ids = torch.from_numpy(repeats.resolve(near, fresh))
        else:
            ids = take("ids", rows * k).reshape(rows, k)
        decoder.finish()
        if rows and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            raise CacheError(f"field {self.name}: a record holds an id beyond the vocabulary: run `kdcli cache verify`")
        return ids, -self._scale.restore(steps.cumsum(dim=1)), odds, log_z


def cut(topk: TopK, k: int) -> TopK:
    """The ``k`` largest entries; what is cut joins the tail. One answer of the teacher may serve fields of several k."""
    if topk.ids.shape[1] <= k:
        return topk
    log_tail = torch.logaddexp(topk.log_tail, topk.log_probs[:, k:].logsumexp(dim=1))
    return TopK(topk.ids[:, :k], topk.log_probs[:, :k], log_tail, topk.log_z)


def table_name(stream: str) -> str:
    """The table of a stream: places of the head share one with their octave (1 | 2-3 | 4-7 | …)."""
    kind, _, place = stream.partition(".")
    return f"{kind}.{int(place).bit_length()}" if place else stream


def create(name: str, params: dict[str, Any], calibration: Mapping[str, torch.Tensor] | None = None) -> TopKField:
    return TopKField(name, Params(**params), calibration)
