"""``affinity``: cosine of every vision hidden state with text hidden states (EM-KD's VLAD, arXiv 2511.21106).

Text tokens in the order of ``TextTokens``: those of responses, which the method reads by default, or all of them (``text``). A reader gets
a column for each token, NaN where it is not stored. Layouts:

- ``dense``: int8 ``[R_vision, n]`` of 127·cos: R·n bytes, no calibration.
- ``factored``: the unit-normalised vision and text states, transform-coded in the Euclidean metric: (R + n)·~30 bytes, far smaller where
  tokens are many. Cosines are products of the factors, off by about 0.4·step (root mean square).

A longer step serves records of many text tokens (``MANY_TEXT``): a token's error is shared by its cosines with all vision tokens, and
averages out over tokens alone.

Version 1 held all text tokens, version 2 had one step for all records: fields that were begun with them are read, gone on with and mended
by them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize

from teacher_cache.codecs import entropy, fitting, transform
from teacher_cache.codecs.entropy import open_record
from teacher_cache.codecs.entropy_tables import Table
from teacher_cache.codecs.transform import Quantised, Transform
from teacher_cache.errors import CacheError, KdcliError
from teacher_cache.fields.calibration import Calibration
from teacher_cache.fields.grids import grids_of, grids_of_all
from teacher_cache.fields.guess import Guess
from teacher_cache.fields.text_columns import columns_of, response_columns, spread
from teacher_cache.records import Prepared, TeacherOutput
from teacher_cache.signal_records import Coded
from teacher_cache.wants import Wants

FIELDS = ("affinity",)
VERSIONS = (1, 2, 3)
SHAPE = ("vision", "text")
LAYOUTS = ("dense", "factored")
TEXTS = ("response", "all")
VISION_ROWS = Table(0, torch.full((1 << 16,), 2.0**-16))
"""Number of vision rows, which the reader must know to split the factors: two bytes."""

STEP, LONG_STEP = 0.02, 0.03
GUESS = Guess(row=32.0, rank=250, step=0.03, power=0.75)
MANY_TEXT = 128
"""Stored text tokens of a record from which on ``long_step`` is its step."""


@dataclass(frozen=True)
class Params:
    """step: of the ``factored`` layout's quantiser, in units of the unit vectors' components; long_step: that of records with many text
    tokens; where ``step`` alone is given it is of all records. text: the text tokens that are stored."""

    layout: str = "dense"
    step: float | None = None
    long_step: float | None = None
    text: str = "response"
    codec_version: int | None = None

    def __post_init__(self) -> None:
        for name, choices in (("layout", LAYOUTS), ("text", TEXTS)):
            if getattr(self, name) not in choices:
                given = getattr(self, name)
                raise KdcliError(f"affinity field: {name} must be one of {', '.join(choices)}, got {given!r}")
        for name in ("step", "long_step"):
            value = getattr(self, name)
            if value is not None and (self.layout == "dense" or not 0 < value < 1):
                raise KdcliError(f"affinity field: {name} belongs to layout = 'factored' and must be in (0, 1)")
        transform.check_version(self.codec_version or transform.VERSION)


def described(version: int, params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of a description of that version, as ``create`` takes them."""
    if version != 1:
        return dict(params)
    return {"text": "all", **({"codec_version": 1} if params.get("layout") == "factored" else {}), **params}


class DenseAffinity:
    name = "affinity"
    shape = SHAPE
    calibrated = False
    temperatures: tuple[float, ...] | None = None
    wants = Wants(hidden={"vision", "text"})

    def __init__(self, text: str = "response") -> None:
        self.version = 1 if text == "all" else 2  # of all tokens as it always was
        self.params: dict[str, Any] = {"layout": "dense"} if text == "all" else {"layout": "dense", "text": text}

    def encode(self, prepared: Prepared, output: TeacherOutput) -> dict[str, torch.Tensor]:
        vision, text = unit_states(output)
        if self.version == 1:
            return {"cosine": self._cosine(vision, text)}
        columns, runs = response_columns(prepared, len(text))
        return {"cosine": self._cosine(vision, text[columns.to(text.device)]), "text": runs}

    @staticmethod
    def _cosine(vision: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        cosine = (vision @ text.T * 127).round().to(torch.int8)
        return cosine if cosine.is_meta else cosine.cpu()  # `kdcli plan` asks for shapes alone

    def decode(self, stored: dict[str, torch.Tensor]) -> torch.Tensor:
        """float32 ``[R_vision, N]`` in [-1, 1], absolute error at most 1/254."""
        cosine = stored["cosine"].to(torch.float32) / 127
        return cosine if self.version == 1 else spread(cosine, stored["text"])

    def coded_rows(self, vision: int, response: int, text: int) -> int:
        return vision + text if vision else 0


@dataclass(frozen=True)
class CodedAffinity(Coded):
    """quantised: unit states of ``vision`` vision rows and the stored text tokens; None without vision rows. text: for ``columns_of``."""

    quantised: Quantised | None
    vision: int
    text: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Of the cosines: (R_vision, N)."""
        return self.vision, int(self.text[0])

    @property
    def stored(self) -> int:
        """Text tokens that are stored."""
        return self.quantised.rows - self.vision if self.quantised else 0


class FactoredAffinity:
    name = "affinity"
    shape = SHAPE
    calibrated = True
    settled_last: tuple[str, ...] = ()
    temperatures: tuple[float, ...] | None = None
    wants = Wants(hidden={"vision", "text"})

    def __init__(self, params: Params, calibration: Mapping[str, torch.Tensor] | None = None):
        step, version = params.step or STEP, params.codec_version or transform.VERSION
        self._long_step = params.long_step or params.step or LONG_STEP
        self.params: dict[str, Any] = {"layout": "factored", "step": step}
        self.version = 3
        if self._long_step == step:
            self.version = 1 if (params.text, version) == ("all", 1) else 2
        if self.version > 1:
            self.params |= {"text": params.text, "codec_version": version}
        if self.version > 2:
            self.params |= {"long_step": self._long_step}
        self._given, self._codec_version, self._calibration = params, version, calibration

    def __reduce__(self) -> tuple[Any, ...]:
        return FactoredAffinity, (self._given, self._calibration)

    @cached_property
    def _coder(self) -> Transform:
        if self._calibration is None:
            raise KdcliError("field affinity: the factored layout needs its calibration")
        return Transform.of(dict(self._calibration))

    @cached_property
    def _long_coder(self) -> Transform:
        """Of records with many text tokens. Classes and tables are those of the other step: such a record is coded by frequencies of its
        own."""
        return replace(self._coder, step=self._long_step)

    def _coder_of(self, text: int) -> Transform:
        """Of a record with so many stored text tokens."""
        return self._long_coder if text >= MANY_TEXT else self._coder

    def encode(self, prepared: Prepared, output: TeacherOutput) -> dict[str, torch.Tensor]:
        vision, text = unit_states(output)
        runs = torch.tensor([len(text)], dtype=torch.int32)
        if not len(vision):  # nothing to compare: text states alone would only cost bytes
            return {"coded": entropy.encode([], 0), "text": runs}
        if self._given.text == "response":
            columns, runs = response_columns(prepared, len(text))
            text = text[columns.to(text.device)]
        grids = grids_of(output, "vision")
        coder = self._coder_of(len(text))
        symbols = coder.quantise(torch.cat([vision, text]), grids)
        stored = coder.record(symbols, grids, [(np.array([len(vision)]), VISION_ROWS)], self._codec_version)
        return stored if self.version == 1 else {**stored, "text": runs}

    def decode(self, stored: dict[str, torch.Tensor]) -> torch.Tensor:
        """float32 ``[R_vision, N]``; a text-only row gives ``[0, N]``."""
        return self.decode_many([stored])[0]

    def decode_many(self, stored: Sequence[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
        """Of several records: what is not reading symbols is done for all of them at once."""
        return self.restore(self.read_many(stored), transform.CPU)

    def read_many(self, stored: Sequence[dict[str, torch.Tensor]]) -> list[CodedAffinity]:
        """Their symbols alone; cosines are made of them by ``restore``, where they are needed."""
        return [self._read(one) for one in stored]

    def _read(self, stored: dict[str, torch.Tensor]) -> CodedAffinity:
        decoder = open_record(stored, "field affinity")
        if not decoder.rows:
            if "text" not in stored:
                raise CacheError(
                    "field affinity: a record of a row without an image is damaged: run `kdcli cache verify`"
                )
            columns_of(stored["text"])
            return CodedAffinity(None, 0, stored["text"])
        rows = int(decoder.take(1, VISION_ROWS)[0])
        others = decoder.rows - rows
        if not 0 < rows <= decoder.rows or rows * others > entropy.MOST_SYMBOLS:
            raise CacheError(f"field affinity: {rows} vision rows of {decoder.rows}: run `kdcli cache verify`")
        text = torch.tensor([others], dtype=torch.int32) if self.version == 1 else stored["text"]
        if len(columns_of(text)) != others:
            raise CacheError(f"field affinity: {others} text tokens, other ones are named: run `kdcli cache verify`")
        return CodedAffinity(self._coder.read(stored, decoder), rows, text)

    def restore(self, records: Sequence[CodedAffinity], device: torch.device) -> list[torch.Tensor]:
        """Of each the cosines float32 ``[R_vision, N]`` on ``device``."""
        states: dict[int, torch.Tensor] = {}
        for coder in (self._coder, self._long_coder):
            own = {number: one.quantised for number, one in enumerate(records) if one.quantised is not None}
            own = {number: one for number, one in own.items() if self._coder_of(records[number].stored) is coder}
            states.update(zip(own, coder.restore(list(own.values()), device)))
        found = []
        for number, one in enumerate(records):
            if number not in states:
                found.append(torch.zeros(one.shape, device=device))
                continue
            factors = states[number]
            found.append(spread(factors[: one.vision] @ factors[one.vision :].T, one.text))
        return found

    def fit(self, outputs: Sequence[TeacherOutput], head: torch.Tensor) -> Calibration:
        """Basis and tables of the unit states of vision rows and all text tokens, on the head's device; not centred, since a mean would
        mix into every cosine."""
        pictured = [one for one in outputs if len(one.hidden["vision"])]
        states = [unit_states(one) for one in pictured]
        if not states:
            raise KdcliError("calibration saw no vision rows: field affinity needs some; use layout = 'dense'")
        rows = torch.cat([part for both in states for part in both]).to(head.device)
        grids = grids_of_all(pictured, "vision", [len(vision) + len(text) for vision, text in states])
        try:
            fitted = fitting.fit(rows, None, self.params["step"], centre=False, grids=grids)
            return Calibration(fitted.tensors(), len(rows))
        except KdcliError as error:
            raise KdcliError(f"field affinity: {error}: raise --calibration-rows, or use layout = 'dense'") from None

    def with_calibration(self, tensors: Mapping[str, torch.Tensor]) -> FactoredAffinity:
        return FactoredAffinity(self._given, tensors)

    def coded_rows(self, vision: int, response: int, text: int) -> int:
        """Vision and stored text states; nothing of a sample without images."""
        return vision + (response if self._given.text == "response" else text) if vision else 0

    def guess_bytes(self, vocabulary: int, heads: int) -> float:
        return GUESS.bytes_at(self.params["step"])

    def guess_files(self, width: int, vocabulary: int) -> dict[str, int]:
        return {"calibration": GUESS.calibration(self.params["step"], width)}


def unit_states(output: TeacherOutput) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit-normalised float32 states where the teacher is: vision ``[R, D]``, text ``[N, D]``."""
    states = (output.hidden[name].to(output.device).to(torch.float32) for name in ("vision", "text"))
    return tuple(normalize(one, dim=1) for one in states)  # type: ignore[return-value]


def create(
    name: str, params: dict[str, Any], calibration: Mapping[str, torch.Tensor] | None = None
) -> DenseAffinity | FactoredAffinity:
    given = Params(**params)
    return DenseAffinity(given.text) if given.layout == "dense" else FactoredAffinity(given, calibration)
