"""Metrics of answers: one file a metric; the folder is the registry.

A metric module defines ``NAME`` and ``score(given, references) -> float | None``: of one answer, 0 to 1, None where the references are
of a kind that the metric does not know (such questions do not count in it). Over many answers it is the mean, unless the module
defines ``summary(answers) -> {column: value}``, answers being pairs of what was given and its references. References: at least one.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

from student_train.registry import choose, named_modules

DEFAULT = ("exact_match",)

Scored = tuple[str, Sequence[str]]
"""(what the model said, references)"""


def metric_modules() -> dict[str, ModuleType]:
    """Every metric by name."""
    return named_modules(__name__, __path__)


def metric_module(name: str) -> ModuleType:
    """A metric's module; KdcliError listing the choices."""
    return choose(metric_modules(), name, "metric")


def measure(name: str, answers: Sequence[Scored]) -> dict[str, float]:
    """A metric over many answers: ``{column: value}``, empty where it applies to none of them."""
    module = metric_module(name)
    if hasattr(module, "summary"):
        return module.summary(answers)
    values = [value for one in answers if (value := module.score(*one)) is not None]
    return {name: sum(values) / len(values)} if values else {}
