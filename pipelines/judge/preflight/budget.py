"""What is near enough, or cheap enough: the budget that ``kdcli preflight`` and ``kdcli plan`` choose by."""

from __future__ import annotations

import math
from dataclasses import dataclass

from teacher_cache.errors import KdcliError

ANGLE, KL = 1.0, 0.005
"""What is near enough where nothing is asked for: degrees and nats."""


@dataclass(frozen=True)
class Budget:
    """At most so many degrees and nats from the live teacher, or so many bytes; one of ``fidelity`` and ``bytes_per_token``, or none.

    Attributes:
        fidelity: degrees between whole gradients. bytes_per_token: of all fields, over vision and response tokens. max_kl: nats, mean.
    """

    fidelity: float | None = None
    bytes_per_token: float | None = None
    max_kl: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not 0 < value < math.inf:
                raise KdcliError(f"--{name.replace('_', '-')} must be above 0, got {value}")
        if self.fidelity is not None and self.bytes_per_token is not None:
            raise KdcliError("--fidelity and --bytes-per-token are two budgets: give one of them")

    @property
    def max_angle(self) -> float:
        """Degrees that a method's terms may be off from the captured cache; infinite under a budget of bytes."""
        return math.inf if self.bytes_per_token else self.fidelity or ANGLE

    def share(self, angle: float, kl: float) -> float:
        """Of what is allowed, the largest share that is used; above 1: not near enough. Of a budget of bytes: degrees."""
        limit = self.max_kl or (math.inf if self.fidelity or self.bytes_per_token else KL)
        if math.isnan(angle) and math.isinf(limit):
            limit = KL  # no student stands on these rows: distributions alone decide
        shares = (angle / (self.fidelity or ANGLE), kl / limit)
        return max(0.0 if math.isnan(one) else one for one in shares)

    def asked(self) -> str:
        """In the words of the command line."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        return " and ".join(f"--{name.replace('_', '-')} {value:g}" for name, value in given.items())
