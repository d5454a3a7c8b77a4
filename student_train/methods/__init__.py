"""One file a method; the folder is the registry.

A method module defines ``NAME``, ``PAPER``, ``STAGES`` (its default stages), ``PRESETS`` (name → instance of its frozen dataclass
of knobs); the dataclass has ``needs() -> set of Need`` (student_train.needs) and ``terms() -> {name: term}`` (losses/terms.py).

What only some methods have are further functions of the dataclass, looked up by ``hook``:

- ``alignment() -> Matching | None``: which teacher row stands beside which vision row of the student (alignment.py).
- ``maps(student_width, teacher_width) -> {name: module}``: learned maps between hidden states, trained beside the student.
- ``passes(progress, generator) -> Passes``: vision tokens that the student's pass, and the gradient-free pass of its own weights, do
  without.
- ``check_student(config, fields)``: an error where a student of this configuration cannot be trained so from the fields that serve the
  method (name → ``field.json``), before its weights are loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from types import ModuleType
from typing import Any, Protocol

from student_train.losses.terms import Terms
from student_train.needs import Need
from student_train.pruning import Descending, Pruning
from student_train.registry import choose, named_modules
from teacher_cache.errors import KdcliError


class Method(Protocol):
    """Frozen knobs of one method."""

    def needs(self) -> frozenset[Need]:
        """What it must know of the teacher."""
        ...

    def terms(self) -> Terms:
        """Its loss, term by term."""
        ...


@dataclass(frozen=True)
class Passes:
    """How one micro-batch goes through the student: ``Pruning`` (or ``Descending``) of either pass, None for all vision tokens.

    self_teacher: whether there is a gradient-free pass of the same weights, whose distributions are ``TeacherView.self_teacher``.
    """

    student: Pruning | Descending | None = None
    teacher: Pruning | Descending | None = None
    self_teacher: bool = False


def hook(method: Method, name: str) -> Any:
    """A function that only some methods have; one that returns None for all others."""
    return getattr(method, name, lambda *arguments: None)


def looks_at_images(method: Method) -> bool:
    """Whether its loss, or its passes, are about vision tokens."""
    return any("vision" in need.what for need in method.needs()) or hasattr(method, "passes")


def text_methods() -> list[str]:
    """Methods that a model of text alone can be trained by, with their default knobs."""
    return [name for name in method_modules() if not looks_at_images(create_method(name))]


def method_modules() -> dict[str, ModuleType]:
    """Every method by name."""
    return named_modules(__name__, __path__)


def method_module(name: str) -> ModuleType:
    """A method's module; KdcliError listing the choices."""
    return choose(method_modules(), name, "method")


def create_method(name: str, preset: str = "paper", knobs: Mapping[str, Any] | None = None) -> Method:
    """A method from a preset and single knobs; KdcliError listing the presets or the knobs."""
    presets = method_module(name).PRESETS
    if preset not in presets:
        raise KdcliError(f"method {name} has no preset {preset!r}: choose from {', '.join(presets)}")
    known = [one.name for one in fields(presets[preset])]
    unknown = sorted(set(knobs or {}) - set(known))
    if unknown:
        raise KdcliError(f"method {name} has no knob {', '.join(unknown)}; it has {', '.join(known) or 'none'}")
    for knob, value in (knobs or {}).items():
        default = getattr(presets[preset], knob)
        accepted = (int, float) if isinstance(default, float) else type(default)
        if not isinstance(value, accepted) or (isinstance(value, bool) and not isinstance(default, bool)):
            raise KdcliError(f"method {name}: {knob} must be a {type(default).__name__}, got {value!r}")
    return replace(presets[preset], **(knobs or {}))
