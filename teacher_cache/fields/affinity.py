"""``affinity``: cosine of every vision hidden state with every text hidden state (EM-KD's VLAD, arXiv 2511.21106).

Over *all* text tokens in the order of ``TextTokens`` (roles are in ``samples``, so the method picks response tokens or all). Layouts:

- ``dense``: int8 ``[R_vision, N]`` of 127·cos: R·N bytes, no calibration.
- ``factored``: the unit-normalised vision and text states, transform-coded in the Euclidean metric: (R + N)·~30 bytes, far smaller where
  tokens are many. Cosines are products of the factors, off by about 0.4·step (root mean square).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize

from teacher_cache.codecs import entropy, fitting, transform
from teacher_cache.codecs.entropy import open_record
from teacher_cache.codecs.transform import Quantised, Transform
from teacher_cache.errors import CacheError, KdcliError
from teacher_cache.fields.calibration import Calibration
from teacher_cache.fields.grids import grids_of, grids_of_all
from teacher_cache.records import Prepared, TeacherOutput

FIELDS = ("affinity",)
LAYOUTS = ("dense", "factored")
VISION_ROWS = entropy.Table(0, torch.full((1 << 16,), 2.0**-16))
"""Number of vision rows, which the reader must know to split the factors: two bytes."""


@dataclass(frozen=True)
class Params:
    """step: of the ``factored`` layout's quantiser, in units of the unit vectors' components."""

    layout: str = "dense"
    step: float | None = None

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise KdcliError(f"affinity field: layout must be one of {', '.join(LAYOUTS)}, got {self.layout!r}")
        if self.step is not None and (self.layout == "dense" or not 0 < self.step < 1):
            raise KdcliError("affinity field: step belongs to layout = 'factored' and must be in (0, 1)")


class DenseAffinity:
    name = "affinity"
    version = 1
    calibrated = False
    temperatures: tuple[float, ...] | None = None
    wants = frozenset({"hidden.vision", "hidden.text"})

    def __init__(self) -> None:
        self.params: dict[str, Any] = {"layout": "dense"}

    def encode(self, prepared: Prepared, output: TeacherOutput) -> dict[str, torch.Tensor]:
        vision, text = unit_states(output)
        cosine = (vision @ text.T * 127).round().to(torch.int8)
        return {"cosine": cosine if cosine.is_meta else cosine.cpu()}  # `kdcli plan` asks for shapes alone

    def decode(self, stored: dict[str, torch.Tensor]) -> torch.Tensor:
        """float32 ``[R_vision, N]`` in [-1, 1], absolute error at most 1/254."""
        return stored["cosine"].to(torch.float32) / 127


class FactoredAffinity:
    name = "affinity"
    version = 1
    calibrated = True
    temperatures: tuple[float, ...] | None = None
    wants = frozenset({"hidden.vision", "hidden.text"})

    def __init__(self, step: float, calibration: Mapping[str, torch.Tensor] | None = None):
        self.params: dict[str, Any] = {"layout": "factored", "step": step}
        self._calibration = calibration

    def __reduce__(self) -> tuple[Any, ...]:
        return create, (self.name, dict(self.params), self._calibration)

    @cached_property
    def _coder(self) -> Transform:
        if self._calibration is None:
            raise KdcliError("field affinity: the factored layout needs its calibration")
        return Transform.of(dict(self._calibration))

    def encode(self, prepared: Prepared, output: TeacherOutput) -> dict[str, torch.Tensor]:
        vision, text = unit_states(output)
        if not len(vision):  # nothing to compare: text states alone would only cost bytes
            return {"coded": entropy.encode([], 0), "text": torch.tensor([len(text)], dtype=torch.int32)}
        grids = grids_of(output, "vision")
        symbols = self._coder.quantise(torch.cat([vision, text]), grids)
        return self._coder.record(symbols, grids, [(np.array([len(vision)]), VISION_ROWS)])

    def decode(self, stored: dict[str, torch.Tensor]) -> torch.Tensor:
        """float32 ``[R_vision, N]``; a text-only row gives ``[0, N]``."""
        return self.decode_many([stored])[0]

    def decode_many(self, stored: Sequence[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
        """Of several records: what is not reading symbols is done for all of them at once."""
        vision: list[int] = []
        quantised: list[Quantised] = []
        found: list[torch.Tensor] = []
        for one in stored:
            decoder = open_record(one, "field affinity")
            if not decoder.rows:
                found.append(torch.zeros(0, self._text_tokens(one)))
                continue
            rows = int(decoder.take(1, VISION_ROWS)[0])
            if not 0 < rows <= decoder.rows or rows * (decoder.rows - rows) > entropy.MOST_SYMBOLS:
                raise CacheError(f"field affinity: {rows} vision rows of {decoder.rows}: run `kdcli cache verify`")
            found.append(torch.empty(0))  # its place
            vision.append(rows)
            quantised.append(self._coder.read(one, decoder))
        pictured = (i for i, one in enumerate(found) if one.ndim == 1)
        for place, rows, states in zip(pictured, vision, self._coder.restore(quantised)):
            found[place] = states[:rows] @ states[rows:].T
        return found

    @staticmethod
    def _text_tokens(stored: Mapping[str, torch.Tensor]) -> int:
        """Of a row without an image, where they are all that is stored."""
        count = int(stored["text"]) if "text" in stored and stored["text"].numel() == 1 else -1
        if not 0 <= count <= entropy.MOST_ROWS:
            raise CacheError("field affinity: a record of a row without an image is damaged: run `kdcli cache verify`")
        return count

    def fit(self, outputs: Sequence[TeacherOutput], head: torch.Tensor) -> Calibration:
        """Basis and tables of the unit states, on the head's device; not centred, since a mean would mix into every cosine."""
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
        return FactoredAffinity(self.params["step"], tensors)


def unit_states(output: TeacherOutput) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit-normalised float32 states where the teacher is: vision ``[R, D]``, text ``[N, D]``."""
    states = (output.hidden[name].to(output.device).to(torch.float32) for name in ("vision", "text"))
    return tuple(normalize(one, dim=1) for one in states)  # type: ignore[return-value]


def create(
    name: str, params: dict[str, Any], calibration: Mapping[str, torch.Tensor] | None = None
) -> DenseAffinity | FactoredAffinity:
    given = Params(**params)
    return DenseAffinity() if given.layout == "dense" else FactoredAffinity(given.step or 0.02, calibration)
