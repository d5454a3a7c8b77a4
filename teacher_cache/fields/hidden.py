"""``vision_hidden`` and ``response_hidden``: post-final-norm hidden states h, with logits = W·h (W: the teacher's head).

Codecs: ``bf16`` (exact for a bfloat16 teacher), ``fp32``, ``int8``, ``int4`` (rotated before they are rounded) give h back and serve every
logit loss over the full vocabulary at any temperature. ``sketch`` keeps what h says about the logits: transform-coded in the head's metric
(``codecs.transform``), with the mean logit m of every row, at a few per cent of the bytes; a reader gets ẑ = y·W′ᵀ + b + m through a
low-rank head that is written once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch

from teacher_cache.codecs import encode_rows, fitting, row_codec, row_codecs, transform
from teacher_cache.codecs.entropy import open_record
from teacher_cache.codecs.entropy_tables import Table, fit_smooth_table
from teacher_cache.codecs.scales import Uniform
from teacher_cache.codecs.transform import Quantised, Transform
from teacher_cache.errors import CacheError, KdcliError
from teacher_cache.fields.calibration import Calibration, tables_of, tensors_of
from teacher_cache.fields.grids import grids_of, grids_of_all
from teacher_cache.fields.guess import Guess
from teacher_cache.records import Prepared, TeacherOutput
from teacher_cache.signal_records import Coded, Sketch
from teacher_cache.wants import Wants

FIELDS = ("vision_hidden", "response_hidden")
SKETCH = "sketch"
MEAN_LOGIT = Uniform(1 / 128)
GUESSES = {
    "response": Guess(row=20.0, rank=100, step=0.1, power=0.6),
    "vision": Guess(row=7.2, rank=82, step=0.1, power=0.65),
}
MOST_PROBS_ROWS = 4096
"""Rows whose distributions make p̄: the mean of a few thousand is as good as that of all."""


@dataclass(frozen=True)
class CodedSketch(Coded):
    """mean_logit: float32 ``[R]``."""

    quantised: Quantised
    mean_logit: torch.Tensor

    def __len__(self) -> int:
        return self.quantised.rows


@dataclass(frozen=True)
class Params:
    """step: Δ of the sketch, in units of the weighted standard deviation of logits."""

    codec: str = "bf16"
    codec_version: int | None = None
    step: float | None = None

    def __post_init__(self) -> None:
        if self.codec not in (*row_codecs(), SKETCH):
            raise CacheError(
                f"unknown codec {self.codec!r}: this version of kdcli reads {', '.join(row_codecs())}, {SKETCH}"
            )
        if self.codec != SKETCH and self.step is not None:
            raise KdcliError(f"hidden field: codec {self.codec} has no step; it belongs to codec = 'sketch'")
        if self.step is not None and not self.step > 0:
            raise KdcliError(f"hidden field: step must be above 0, got {self.step}")


class Ground(NamedTuple):
    """What no step of a sketch changes: axes, S⁻¹·R float32 ``[D, D]``, b float32 ``[V]``, further tensors, how many rows were seen.

    W′, as large as the head, is made of it and the head at each step: grounds of several fields stand in memory for long.
    """

    basis: fitting.Basis
    expand: torch.Tensor
    bias: torch.Tensor
    others: dict[str, torch.Tensor]
    rows: int


class HiddenField:
    """Hidden states by a row codec."""

    version = 1
    calibrated = False
    temperatures: tuple[float, ...] | None = None

    def __init__(self, name: str, params: Params):
        self.name = name
        self.rows = name.removesuffix("_hidden")
        self._codec = row_codec(params.codec, params.codec_version)
        self.params = {"codec": params.codec, "codec_version": self._codec.VERSION}
        self.wants = Wants(hidden={self.rows})
        self.shape = (self.rows, "width")

    def __reduce__(self) -> tuple[Any, ...]:
        # A codec is a module, and those do not travel to worker processes.
        return create, (self.name, dict(self.params))

    def encode(self, prepared: Prepared, output: TeacherOutput) -> dict[str, torch.Tensor]:
        return encode_rows(self._codec, output.hidden[self.rows], output.device)

    def decode(self, stored: dict[str, torch.Tensor]) -> torch.Tensor:
        """float32 ``[R, D]``."""
        return self._codec.decode(stored)


class SketchField:
    """Hidden states, transform-coded in the head's metric."""

    version = 1
    calibrated = True
    settled_last: tuple[str, ...] = ("step",)
    temperatures: tuple[float, ...] | None = None

    def __init__(self, name: str, params: Params, calibration: Mapping[str, torch.Tensor] | None = None):
        version = params.codec_version or transform.VERSION
        transform.check_version(version)
        self.name = name
        self.rows = name.removesuffix("_hidden")
        self.params: dict[str, Any] = {"codec": SKETCH, "codec_version": version, "step": params.step or 0.1}
        self.wants = Wants(hidden={self.rows})
        self.shape = (self.rows,)
        self._calibration = calibration

    def __reduce__(self) -> tuple[Any, ...]:
        return create, (self.name, dict(self.params), self._calibration)

    @cached_property
    def _fitted(self) -> tuple[Transform, Table, torch.Tensor]:
        if self._calibration is None:
            raise KdcliError(f"field {self.name}: a sketch needs its calibration")
        tensors = dict(self._calibration)
        return Transform.of(tensors), tables_of(tensors)["mean_logit"], tensors["mean_weight"]

    @property
    def rank(self) -> int:
        """r: how wide the coefficients are."""
        return self._fitted[0].rank

    def encode(self, prepared: Prepared, output: TeacherOutput) -> dict[str, torch.Tensor]:
        coder, table, mean_weight = self._fitted
        rows = output.hidden[self.rows].to(output.device).to(torch.float32)  # it travels in the teacher's dtype
        means = MEAN_LOGIT.quantise((rows @ mean_weight.to(output.device)).cpu()).numpy()
        grids = grids_of(output, self.rows)
        symbols = coder.quantise(rows, grids)
        return coder.record(symbols, grids, [(means, table)], self.params["codec_version"])

    def decode(self, stored: dict[str, torch.Tensor]) -> Sketch:
        """``Sketch``: float32 coefficients ``[R, r]`` and mean logits ``[R]``."""
        return self.decode_many([stored])[0]

    def decode_many(self, stored: Sequence[dict[str, torch.Tensor]]) -> list[Sketch]:
        """Of several records: what is not reading symbols is done for all of them at once."""
        return self.restore(self.read_many(stored), transform.CPU)

    def read_many(self, stored: Sequence[dict[str, torch.Tensor]]) -> list[CodedSketch]:
        """Their symbols alone; numbers are made of them by ``restore``, where they are needed."""
        coder, table, _ = self._fitted
        found = []
        for one in stored:
            decoder = open_record(one, f"field {self.name}")
            means = MEAN_LOGIT.restore(torch.from_numpy(decoder.take(decoder.rows, table).astype(np.int64)))
            found.append(CodedSketch(coder.read(one, decoder), means))
        return found

    def restore(self, records: Sequence[CodedSketch], device: torch.device) -> list[Sketch]:
        """On ``device``."""
        made = self._fitted[0].restore([one.quantised for one in records], device)
        return [Sketch(values, one.mean_logit.to(device)) for values, one in zip(made, records)]

    def fit(self, outputs: Sequence[TeacherOutput], head: torch.Tensor) -> Calibration:
        """Basis, tables and low-rank head from the rows of a few hundred samples; head W ``[V, D]``, on whose device they are made."""
        return self.fit_on(self.ground(outputs, head), head)

    def ground(self, outputs: Sequence[TeacherOutput], head: torch.Tensor) -> Ground:
        """What fits of every step have in common; as ``fit`` takes it.

        W′ = W_c S⁻¹ R and b = W_c h̄ with W_c = W minus its uniform column mean (centred before it is rounded to bfloat16).
        """
        rows = torch.cat([one.hidden[self.rows] for one in outputs]).to(head.device, torch.float32)
        try:
            root, inverse = fitting.head_metric(head, mean_probs(rows, head))
            grids = grids_of_all(outputs, self.rows, [len(one.hidden[self.rows]) for one in outputs])
            basis = fitting.fit_basis(rows, root, grids=grids)
        except KdcliError as error:
            raise KdcliError(
                f"field {self.name}: {error}: raise --calibration-rows, or use another codec (bf16)"
            ) from None
        wide, centre = centred(head)
        # encode = S·R, so R = S⁻¹·encode and h − h̄ ≈ S⁻¹·R·y.
        expand = (inverse @ (inverse @ basis.encode.to(inverse))).to(torch.float32)
        bias = wide @ basis.mean.to(wide)
        means = fit_smooth_table(MEAN_LOGIT.quantise((rows @ centre).cpu()).numpy())
        others = {**tensors_of({"mean_logit": means}), "mean_weight": centre.cpu()}
        return Ground(basis, expand, bias.cpu(), others, len(rows))

    def fit_on(self, ground: Ground, head: torch.Tensor) -> Calibration:
        """At this field's step; head as ``ground`` took it."""
        coder = fitting.at_step(ground.basis, self.params["step"])
        weight = (centred(head)[0] @ ground.expand).to(torch.bfloat16).cpu()
        low_rank = {"weight": weight[:, : coder.rank].contiguous(), "bias": ground.bias}
        return Calibration({**coder.tensors(), **ground.others}, ground.rows, low_rank)

    def with_calibration(self, tensors: Mapping[str, torch.Tensor]) -> SketchField:
        return SketchField(self.name, Params(**self.params), tensors)

    def guess_bytes(self, vocabulary: int, heads: int) -> float:
        return GUESSES[self.rows].bytes_at(self.params["step"])

    def guess_files(self, width: int, vocabulary: int) -> dict[str, int]:
        guess, step = GUESSES[self.rows], self.params["step"]
        low_rank = vocabulary * (2 * guess.rank_at(step, width) + 4)
        return {"calibration": guess.calibration(step, width), "low_rank_head": low_rank}


def centred(head: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(W minus its column mean float32 ``[V, D]``, the mean ``[D]``), on the head's device."""
    wide = head.to(torch.float32)
    centre = wide.mean(dim=0)
    return wide - centre, centre


def mean_probs(rows: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """p̄ float32 ``[V]``: the mean distribution over at most ``MOST_PROBS_ROWS`` rows, evenly chosen."""
    chosen = rows[:: max(1, len(rows) // MOST_PROBS_ROWS)]
    total = torch.zeros(len(head), device=head.device)
    wide = head.to(torch.float32)
    for chunk in chosen.split(256):
        total += torch.softmax(chunk @ wide.T, dim=1).sum(dim=0)
    return total / max(1, len(chosen))


def create(
    name: str, params: dict[str, Any], calibration: Mapping[str, torch.Tensor] | None = None
) -> HiddenField | SketchField:
    given = Params(**params)
    return SketchField(name, given, calibration) if given.codec == SKETCH else HiddenField(name, given)
