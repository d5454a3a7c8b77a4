"""What every method with a temperature shares: both sides are softened by it, and its divergences are multiplied by T² (no method
itself: it has no ``NAME``).

Gradients of soft targets shrink as 1/T² (Hinton et al., arXiv 1503.02531). The factor keeps their balance with the cross-entropy where T
is changed. At T = 1 it is 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from teacher_cache.errors import KdcliError


@dataclass(frozen=True)
class SoftTargets:
    """temperature: of both distributions. temperature_squared: multiply divergences by its square."""

    temperature: float = 1.0
    temperature_squared: bool = True

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise KdcliError(f"temperature must be above 0, got {self.temperature:g}")

    def softened(self, weight: float) -> float:
        """The weight of a divergence at the temperature."""
        return weight * self.temperature**2 if self.temperature_squared else weight


def square_note(name: str, method: object) -> str:
    """One line for whoever trains at another temperature than 1: which factor is taken; "" for all others."""
    if not isinstance(method, SoftTargets) or method.temperature == 1.0:
        return ""
    at, square = f"{name} at T={method.temperature:g}", method.temperature**2
    if not method.temperature_squared:
        return f"{at}: divergences are not multiplied by T² (temperature_squared=false)"
    return (
        f"{at}: divergences are multiplied by T² = {square:g}, as in every method (llava-kd, em-kd, minillm-offline, distillm-offline "
        "and jsd did without until now); --set temperature_squared=false leaves the factor out"
    )
