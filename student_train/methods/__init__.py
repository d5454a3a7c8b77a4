"""One file a method; the folder is the registry, and so are entry points ``kdcli.methods`` of other packages.

A method module defines ``NAME``, ``PAPER``, ``STAGES`` (its default stages), ``PRESETS`` (name → instance of its frozen dataclass
of knobs; without one named ``default``, ``paper`` is the default). It may define ``TERMS`` (name of a loss term → what it is, in words)
and ``RECIPES`` (name of a preset → ``Recipe``, where that has stages or rates of its own). The dataclass has ``needs() -> set of Need``
(student_train.needs) and ``terms() -> {name: term}`` (losses/terms.py).

What only some methods have are further functions of the dataclass, looked up by ``hook``:

- ``alignment() -> Matching | None``: which teacher row stands beside which vision row of the student (alignment.py).
- ``maps(student_width, teacher_width) -> {name: module}``: learned maps between hidden states, trained beside the student.
- ``passes(progress, generator) -> Passes``: vision tokens that the student's pass, and the gradient-free pass of its own weights, do
  without.
- ``check_student(config, fields)``: an error where a student of this configuration cannot be trained so from the fields that serve the
  method (name → ``field.json``), before its weights are loaded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from types import ModuleType
from typing import Any, Protocol

from student_train.losses.terms import Terms
from student_train.needs import Need
from student_train.pruning import Descending, Pruning
from student_train.registry import choose, named_modules
from teacher_cache.errors import KdcliError
from teacher_cache.plugins import with_plugins

DEFAULT = "default"
"""The preset that is taken where none is named."""


@dataclass(frozen=True)
class Recipe:
    """What a preset brings besides knobs.

    Attributes:
        stages: of the run, where ``--stages`` says nothing.
        settings: stage → keys of ``[stages.NAME]``, where kd.toml and flags say nothing.
    """

    stages: str
    settings: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


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


def draws(method: Method) -> bool:
    """Whether a method draws something for every micro-batch."""
    return hasattr(method, "passes") or bool(getattr(hook(method, "alignment")(), "columns", 0))


def looks_at_images(method: Method) -> bool:
    """Whether its loss, or its passes, are about vision tokens."""
    return any("vision" in need.what for need in method.needs()) or hasattr(method, "passes")


def text_methods() -> list[str]:
    """Methods that a model of text alone can be trained by, with their default knobs."""
    return [name for name in method_modules() if not looks_at_images(create_method(name))]


def method_modules() -> dict[str, ModuleType]:
    """Every method by name, those of installed packages too (``kdcli.methods``)."""
    return with_plugins("kdcli.methods", named_modules(__name__, __path__), _names)


def _names(module: ModuleType) -> tuple[str]:
    _ = module.PAPER, module.STAGES, module.PRESETS
    return (module.NAME,)


def method_module(name: str) -> ModuleType:
    """A method's module; KdcliError listing the choices."""
    return choose(method_modules(), name, "method")


def presets_of(name: str) -> dict[str, Any]:
    """A method's presets by name, ``default`` first; which is the paper's until there is another."""
    own = method_module(name).PRESETS
    return {DEFAULT: own.get(DEFAULT, own["paper"]), **own}


def terms_of(name: str) -> dict[str, str]:
    """Loss term → what it is in words, of a method and of its plain stages; empty for a method that is not known or explains none."""
    modules = method_modules()
    own = getattr(modules.get(name), "TERMS", {})
    return {**modules["sft"].TERMS, **own} if own else {}


def recipe_of(name: str, preset: str) -> Recipe:
    """Stages and settings of a preset."""
    module = method_module(name)
    return getattr(module, "RECIPES", {}).get(preset) or Recipe(module.STAGES)


def create_method(name: str, preset: str = DEFAULT, knobs: Mapping[str, Any] | None = None) -> Method:
    """A method from a preset and single knobs; KdcliError listing the presets or the knobs."""
    presets = presets_of(name)
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
    try:
        method = replace(presets[preset], **(knobs or {}))
        check_weights(method.terms())
    except KdcliError as error:
        raise KdcliError(f"{name}: {error}") from None
    return method


def check_weights(terms: Terms) -> None:
    """KdcliError where nothing would be learned, or anything be pushed away from the teacher."""
    if not terms:
        raise KdcliError("every weight is 0: nothing is left to learn")
    for name, term in terms.items():
        if not 0 <= term.weight < math.inf:
            raise KdcliError(f"the weight of {name} must be a number from 0 on, got {term.weight:g}")
