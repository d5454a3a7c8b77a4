"""The stages of the papers: which parts they read, what they train, and whether the method or plain SFT computes the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from teacher_cache.errors import CompatibilityError, KdcliError


@dataclass(frozen=True)
class Stage:
    """parts: default mixture parts. trains: module groups (``Family.modules``). distils: the method's loss, else plain SFT."""

    name: str
    parts: tuple[str, ...]
    trains: tuple[str, ...]
    distils: bool
    learning_rate: float


STAGES = {
    stage.name: stage
    for stage in (
        Stage("PT", ("caption",), ("projector",), False, 1e-3),
        Stage("DPT", ("caption",), ("projector",), True, 1e-3),
        Stage("SFT", ("sft",), ("projector", "language_model"), False, 2e-5),
        Stage("DFT", ("sft",), ("projector", "language_model"), True, 2e-5),
    )
}


def stages_of_text(stages: Sequence[Stage], asked: bool, student: str) -> list[Stage]:
    """Those that a student of text alone can have: it has no projector.

    Args:
        asked: the user named them. CompatibilityError then where one of them trains the projector alone.
    """
    lost = [stage.name for stage in stages if stage.trains == ("projector",)]
    if lost and asked:
        raise CompatibilityError(
            f"stage {lost[0]} trains the projector alone, and {student} is text-only: leave it out of --stages"
        )
    return [stage for stage in stages if stage.name not in lost]


def parse_stages(text: str) -> list[Stage]:
    """``DPT,SFT,DFT`` or ``DPT-SFT-DFT`` → stages; KdcliError listing the choices."""
    names = [name.strip().upper() for name in text.replace("-", ",").split(",") if name.strip()]
    unknown = [name for name in names if name not in STAGES]
    if unknown or not names:
        raise KdcliError(
            f"unknown stage {', '.join(unknown) or '(none)'}: choose from {', '.join(STAGES)}, e.g. --stages DPT,SFT,DFT"
        )
    return [STAGES[name] for name in names]
