"""``schedule`` and ``select`` of kd.toml: what is said of terms by their names, as each stage has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from student_train.config import StageSettings, TrainSettings
from student_train.losses.terms import Terms
from student_train.schedules import Schedule, parse_schedule
from student_train.selection import Selector, parse_selector
from student_train.stages import Stage
from teacher_cache.errors import KdcliError

KEYS = ("schedule", "select")


@dataclass(frozen=True)
class TermSettings:
    """Of one stage, by term."""

    schedules: Mapping[str, Schedule] = field(default_factory=dict)
    selection: Mapping[str, Selector] = field(default_factory=dict)

    def identity(self) -> dict[str, object]:
        """What a checkpoint must agree with; nothing where nothing is set, as in versions that had neither."""
        schedules = {term: [one.kind, *one.numbers] for term, one in self.schedules.items()}
        selection = {
            term: [one.text, *([one.column.sha256] if one.column and one.column.sha256 else [])]
            for term, one in self.selection.items()
        }
        told = {"schedule": schedules, "select": selection}
        return {name: body for name, body in told.items() if body}


def of_stage(method: str, stage: Stage, own: StageSettings, train: TrainSettings, terms: Terms) -> TermSettings:
    """What a stage's terms are told: by ``[stages.NAME]``; else by ``[train]`` where the stage has the method's loss.

    Method ``sft`` has it in every stage.

    Raises:
        KdcliError: a setting that says nothing, or the stage's own one of a term that it has not.
    """
    told: dict[str, dict[str, str]] = {}
    for key in KEYS:
        mine, shared = getattr(own, key), getattr(train, key)
        for term in mine or {}:
            if term not in terms:
                raise KdcliError(f"[stages.{stage.name}] {key}: no term {term} there; its terms are {', '.join(terms)}")
        known = mine if mine is not None else (shared or {}) if stage.distils or method == "sft" else {}
        told[key] = {term: text for term, text in known.items() if term in terms}
    return TermSettings(
        {term: parse_schedule(term, text) for term, text in told["schedule"].items()},
        {term: parse_selector(term, text) for term, text in told["select"].items()},
    )


def refuse_unknown_terms(method: str, train: TrainSettings, stages: Sequence[tuple[Stage, Terms]]) -> None:
    """KdcliError where ``[train]`` or a flag speaks of a term that no stage with the method's loss has."""
    terms = dict.fromkeys(term for stage, each in stages if stage.distils or method == "sft" for term in each)
    for key in KEYS:
        if unknown := sorted((getattr(train, key) or {}).keys() - terms.keys()):
            has = (
                f"its terms are {', '.join(terms)}"
                if terms
                else "no stage has its loss: choose --stages with DPT or DFT"
            )
            raise KdcliError(f"{key}: {method} has no term {', '.join(unknown)}; {has}")
