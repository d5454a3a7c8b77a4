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

from teacher_cache.codecs import entropy, transform
from teacher_cache.codecs.entropy import Decoder
from teacher_cache.codecs.transform import Transform
from teacher_cache.errors import CacheError, KdcliError
from teacher_cache.fields.calibration import Calibration
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
        return {"cosine": (vision @ text.T * 127).round().to(torch.int8)}

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
        symbols = self._coder.quantise(torch.cat([vision, text]))
        streams = [(np.array([len(vision)]), VISION_ROWS), *self._coder.streams(symbols)]
        return {"coded": entropy.encode(streams, len(symbols))}

    def decode(self, stored: dict[str, torch.Tensor]) -> torch.Tensor:
        """float32 ``[R_vision, N]``; a text-only row gives ``[0, N]``."""
        decoder = Decoder(stored["coded"])
        if not decoder.rows:
            return torch.zeros(0, int(stored["text"]))
        vision = int(decoder.take(1, VISION_ROWS)[0])
        if vision > decoder.rows:
            raise CacheError(f"field affinity: {vision} vision rows of {decoder.rows}")
        states = self._coder.read(decoder)
        decoder.finish()
        return states[:vision] @ states[vision:].T

    def fit(self, outputs: Sequence[TeacherOutput], head: torch.Tensor) -> Calibration:
        """Basis and tables of the unit states; not centred, since a mean would mix into every cosine."""
        rows = torch.cat([part for one in outputs for part in unit_states(one) if len(unit_states(one)[0])])
        try:
            return Calibration(transform.fit(rows, None, self.params["step"], centre=False).tensors(), len(rows))
        except KdcliError as error:
            raise KdcliError(f"field affinity: {error}: raise --calibration-rows, or use layout = 'dense'") from None

    def with_calibration(self, tensors: Mapping[str, torch.Tensor]) -> FactoredAffinity:
        return FactoredAffinity(self.params["step"], tensors)


def unit_states(output: TeacherOutput) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit-normalised float32 states: vision ``[R, D]``, text ``[N, D]``."""
    return tuple(normalize(output.hidden[name].to(torch.float32), dim=1) for name in ("vision", "text"))  # type: ignore[return-value]


def create(
    name: str, params: dict[str, Any], calibration: Mapping[str, torch.Tensor] | None = None
) -> DenseAffinity | FactoredAffinity:
    given = Params(**params)
    return DenseAffinity() if given.layout == "dense" else FactoredAffinity(given.step or 0.03, calibration)
