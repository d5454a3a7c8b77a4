"""``vision_sampled`` and ``response_sampled``: a few ids a row with weights, unbiased for what is linear in p (teachers/sampling.py).

They serve forward KL and cross-entropy at temperature 1: right on average, noisy in each row. Samplers:

- ``threshold`` (default): k ids, those above the row's threshold τ exact, the others all of weight τ; the least variance for k ids.
- ``random``: the distinct ids of N draws with their counts (Sparse Logit Sampling, arXiv 2503.16870).

Stored: ``ids`` uint8 (one byte w, then all rows' ids in w bits each), ``sizes`` uint8 or uint16 ``[R, 1 or 2]`` (ids of a row; how
many of them are exact), ``scalars`` float32 ``[R, 1 or 2]`` (entropy of the whole distribution in nats; τ), and ``counts`` (uint8 or
uint16) or ``exact`` (float16 log-probs above τ, one after the other). The weights of a row sum to 1, so that what float16 loses is given
back by a common factor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from teacher_cache.codecs.bits import WIDEST, pack_bits, unpack_bits, width_of
from teacher_cache.errors import CacheError, KdcliError
from teacher_cache.fields.guess import id_bytes
from teacher_cache.records import Prepared, TeacherOutput
from teacher_cache.signal_records import Sampled
from teacher_cache.wants import Sampling, Wants

FIELDS = ("vision_sampled", "response_sampled")
DEFAULTS = {"threshold": 16, "random": 50}
"""Sampler → ids or draws a row."""
LARGEST = (1 << 16) - 1


@dataclass(frozen=True)
class Params:
    """k: ids a row (``threshold``). draws: draws a row (``random``). seed: of all rows' uniforms."""

    sampler: str = "threshold"
    k: int | None = None
    draws: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sampler not in DEFAULTS:
            raise KdcliError(f"sampled field: sampler must be one of {', '.join(DEFAULTS)}, got {self.sampler!r}")
        size, other = ("draws", "k") if self.sampler == "random" else ("k", "draws")
        if getattr(self, other) is not None:
            raise KdcliError(f"sampled field: sampler = {self.sampler!r} takes {size}, not {other}")
        given = getattr(self, size)
        if given is not None and not 1 <= given <= LARGEST:
            raise KdcliError(f"sampled field: {size} must be in 1 … {LARGEST}, got {given}")

    @property
    def size(self) -> int:
        return (self.draws if self.sampler == "random" else self.k) or DEFAULTS[self.sampler]


class SampledField:
    version = 1
    calibrated = False
    temperatures: tuple[float, ...] | None = (1.0,)

    def __init__(self, name: str, params: Params):
        self.name = name
        self.rows = name.removesuffix("_sampled")
        self._random = params.sampler == "random"
        self._size = params.size
        self.params: dict[str, Any] = {
            "sampler": params.sampler,
            "draws" if self._random else "k": params.size,
            "seed": params.seed,
        }
        self.shape = (self.rows,)
        self.wants = Wants(sampled={self.rows: Sampling(params.sampler, params.size, params.seed)})

    def encode(self, prepared: Prepared, output: TeacherOutput) -> dict[str, torch.Tensor]:
        sampled = output.sampled[self.rows]
        # What weighs most comes first; ids of one weight stay in their order.
        weights, order = sampled.weights.sort(dim=1, descending=True, stable=True)
        ids = sampled.ids.gather(1, order)
        held = weights > 0
        sizes = [held.sum(dim=1)]
        scalars = [sampled.entropy]
        if self._random:
            counts = (weights[held].double() * self._size).round()
            values = {"counts": counts.to(_unsigned(counts))}
        else:
            threshold = weights.masked_fill(~held, torch.inf).amin(dim=1) if weights.numel() else weights.sum(dim=1)
            exact = weights > threshold[:, None]
            sizes.append(exact.sum(dim=1))
            scalars.append(threshold)
            values = {"exact": weights[exact].log().to(torch.float16)}
        each = torch.stack(sizes, dim=1)
        return {
            "ids": _pack(ids[held]),
            "sizes": each.to(_unsigned(each)),
            "scalars": torch.stack(scalars, dim=1).to(torch.float32),
            **values,
        }

    def decode(self, stored: dict[str, torch.Tensor]) -> Sampled:
        """``Sampled``, what weighs most first (up to float16's rounding)."""
        values, columns = ("counts", 1) if self._random else ("exact", 2)
        if set(stored) != {"ids", "sizes", "scalars", values}:
            raise CacheError(f"field {self.name}: a record holds {sorted(stored)}")
        sizes, scalars = stored["sizes"].to(torch.int64), stored["scalars"]
        if sizes.ndim != 2 or sizes.shape != scalars.shape or sizes.shape[1] != columns:
            raise CacheError(f"field {self.name}: sizes {list(sizes.shape)} and scalars {list(scalars.shape)} disagree")
        if bool((sizes[:, -1] > sizes[:, 0]).any()):
            raise CacheError(f"field {self.name}: a row holds more exact ids than ids: run `kdcli cache verify`")
        places = torch.arange(int(sizes.max()) if sizes.numel() else 0)
        held = places < sizes[:, :1]
        ids = torch.zeros(held.shape, dtype=torch.int64)
        ids[held] = _unpack(stored["ids"], int(held.sum()))
        weights = torch.zeros(held.shape, dtype=torch.float64)
        listed = held if self._random else places < sizes[:, 1:]
        if int(listed.sum()) != stored[values].numel():
            raise CacheError(
                f"field {self.name}: {stored[values].numel()} {values} where the sizes say {int(listed.sum())}"
            )
        if self._random:
            weights[held] = stored["counts"].to(torch.float64) / self._size
        else:
            weights[listed] = stored["exact"].to(torch.float64).exp()
            weights = _sum_to_one(weights, held & ~listed, scalars[:, 1].to(torch.float64))
        return Sampled(ids, weights.to(torch.float32), scalars[:, 0])

    def guess_bytes(self, vocabulary: int, heads: int) -> float:
        """k ids, half of them exact, or a fifth as many ids as draws.

        How many ids N draws give is the teacher's entropy: 50 draws gave 2 on the demo teacher and 28 on a flat language model.
        """
        each = id_bytes(vocabulary) + 1
        return 5 + self._size / 5 * each if self._random else 10 + self._size * each


def _sum_to_one(weights: torch.Tensor, others: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """Exact weights scaled to what the others, of weight τ each, leave of 1."""
    rest = others * threshold[:, None]
    mass = weights.sum(dim=1)
    scale = (1 - rest.sum(dim=1)) / mass.clamp_min(torch.finfo(mass.dtype).tiny)
    return weights * scale[:, None] + rest


def _unsigned(values: torch.Tensor) -> torch.dtype:
    return torch.uint8 if not values.numel() or int(values.max()) < 256 else torch.uint16


def _pack(ids: torch.Tensor) -> torch.Tensor:
    """uint8: the width, then the ids in that many bits each."""
    width = width_of(int(ids.max()) + 1) if len(ids) else 1
    return torch.cat([torch.tensor([width], dtype=torch.uint8), pack_bits(ids, width)])


def _unpack(data: torch.Tensor, count: int) -> torch.Tensor:
    if data.dtype != torch.uint8 or not len(data) or not 1 <= int(data[0]) <= WIDEST:
        raise CacheError("packed ids do not begin with their width: run `kdcli cache verify`")
    return unpack_bits(data[1:], int(data[0]), count)


def create(name: str, params: dict[str, Any]) -> SampledField:
    return SampledField(name, Params(**params))
