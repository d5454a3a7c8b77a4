"""What every stage of a run will do, decided and checked before any model loads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipelines.settings import Settings
from pipelines.train.term_settings import TermSettings, of_stage, refuse_unknown_terms
from student_train.compression import asked_for
from student_train.compressors import CompressorSpec
from student_train.config import StageSettings, TrainSettings
from student_train.load_student import open_student
from student_train.methods import (
    DEFAULT,
    Method,
    create_method,
    looks_at_images,
    method_module,
    recipe_of,
    text_methods,
)
from student_train.needs import Served, serve
from student_train.selection import needs_of
from student_train.stages import Stage, parse_stages, stages_of_text
from student_train.student_rows import compares_rows
from teacher_cache.errors import CompatibilityError, KdcliError
from teacher_cache.models.kind import open_config, reads_images
from teacher_cache.preparing.fingerprint import is_text_alone
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.reading.complete_fields import complete_fields


@dataclass(frozen=True)
class StagePlan:
    """One stage with everything decided: its settings, method, the fields that serve it, what its terms are told, and what compresses
    vision tokens.

    compressor: None: as the student is.
    """

    number: int
    stage: Stage
    settings: TrainSettings
    parts: tuple[str, ...]
    method_name: str
    method: Method
    served: Served
    compressor: CompressorSpec | None = None
    terms: TermSettings = field(default_factory=TermSettings)

    def folder(self, output: Path) -> Path:
        return output / f"{self.number:02d}-{self.stage.name}"


def plan_stages(
    cache: TeacherCache,
    method: str,
    settings: Settings,
    stages: str | None,
    preset: str,
    knobs: Mapping[str, Any] | None,
) -> list[StagePlan]:
    """Decide every stage; refuses a method, knob, part or need that cannot be had."""
    module, recipe = method_module(method), recipe_of(method, preset)
    shared = {**settings.methods.get(method, {}), **(knobs or {})}
    create_method(method, preset, shared)
    plain = create_method("sft")
    listed = parse_stages(stages or recipe.stages)
    blind = blind_side(cache, settings.train)
    if blind.startswith("student"):
        listed = stages_of_text(listed, bool(stages), blind)
    if blind:
        for stage in (one for one in listed if one.distils):
            own = settings.stages.get(stage.name, StageSettings())
            refuse_blind(create_method(method, preset, {**shared, **(own.knobs or {})}), method, blind)
    plans = []
    for number, stage in enumerate(listed, start=1):
        own = settings.stages.get(stage.name, StageSettings())
        merged = with_recipe(own, settings.train, recipe.settings.get(stage.name, {}))
        if not merged.learning_rate:
            merged = replace(merged, learning_rate=stage.learning_rate)
        parts = own.parts or stage.parts
        refuse_missing_parts(f"{method}: stage {stage.name}", stage.name, parts, str(cache.storage), cache.parts())
        if own.knobs and not stage.distils:
            raise KdcliError(f"stage {stage.name} is plain SFT: it has no knobs; give them to DPT or DFT")
        used = create_method(method, preset, {**shared, **(own.knobs or {})}) if stage.distils else plain
        params = {name: cache.fields[name]["params"] for name in complete_fields(cache, parts)}
        told = of_stage(method, stage, own, settings.train, used.terms())
        served = serve(used.needs() | needs_of(told.selection), params, method, str(cache.storage))
        compressor = asked_for(merged, getattr(module, "COMPRESSOR", None))
        name = method if stage.distils else "sft"
        plans.append(StagePlan(number, stage, merged, parts, name, used, served, compressor, told))
    refuse_unknown_terms(method, settings.train, [(plan.stage, plan.method.terms()) for plan in plans])
    return plans


def refuse_default_parts(method: str, settings: Settings, parts: Sequence[str], blind_student: bool) -> None:
    """``refuse_missing_parts`` for the stages of the method's default recipe, of a mixture with these parts."""
    listed = parse_stages(recipe_of(method, DEFAULT).stages)
    for stage in stages_of_text(listed, False, "") if blind_student else listed:
        wanted = settings.stages.get(stage.name, StageSettings()).parts or stage.parts
        refuse_missing_parts(f"{method}: stage {stage.name}", stage.name, wanted, "the mixture", parts)


def refuse_missing_parts(what: str, stage: str, wanted: Sequence[str], where: str, there: Sequence[str]) -> None:
    """KdcliError where a stage trains on a part that is not there. what, where: in words, the stage and what holds the parts."""
    if missing := [part for part in wanted if part not in there]:
        raise KdcliError(
            f"{what} trains on part {missing[0]}, and {where} has {', '.join(there)}: name its parts in kd.toml, e.g. "
            f"[stages.{stage}] parts = [{there[0]!r}], add data with part = {missing[0]!r}, or leave the stage out with --stages"
        )


def with_recipe(own: StageSettings, train: TrainSettings, recipe: Mapping[str, Any]) -> TrainSettings:
    """A stage's settings; what neither it nor ``[train]`` sets is the recipe's."""
    plain = TrainSettings()
    unset = [name for name in recipe if getattr(train, name) == getattr(plain, name) and getattr(own, name) is None]
    return replace(own.over(train), **{name: recipe[name] for name in unset})


def blind_side(cache: TeacherCache, train: TrainSettings) -> str:
    """Which side reads text alone, in words: the student, or else the teacher whose rows the cache holds; "" for neither."""
    teacher = f"the teacher of {cache.storage}" if is_text_alone(cache.plan.preparation) else ""
    return blind_student(train) or teacher


def blind_student(train: TrainSettings) -> str:
    """The student, in words, where it reads text alone; "" where it reads images or none is named."""
    what = f"student {train.student!r}"
    if not train.student or reads_images(open_config(what, train.student, trust_remote_code=train.trust_remote_code)):
        return ""
    return what


def refuse_blind(method: Method, name: str, blind: str) -> None:
    """CompatibilityError for a method that learns from vision tokens, where one side has none."""
    if looks_at_images(method):
        needs = sorted(str(need) for need in method.needs() if "vision" in need.what) or ["vision tokens to remove"]
        raise CompatibilityError(
            f"method {name} needs {', '.join(needs)}, and {blind} is text-only: use {', '.join(text_methods())}"
        )


def settle_compressor(plans: list[StagePlan], student: str) -> list[StagePlan]:
    """The plans with their one compressor settled; CompatibilityError where the student cannot have it, before its weights are read."""
    _, _, spec = open_student(student, plans[0].settings.trust_remote_code, plans[0].compressor)
    for plan in plans:
        if spec and row_aligned(plan):
            raise CompatibilityError(
                f"method {plan.method_name} compares the student's vision tokens with the teacher's one by one, but compressor "
                f"{spec.name} leaves {student} only {spec.count} an image: use --method em-kd, which matches them, or a student "
                "without compression"
            )
    return [replace(plan, compressor=spec) for plan in plans]


def row_aligned(plan: StagePlan) -> bool:
    """Whether row i of the student is compared with row i of the teacher."""
    return compares_rows(plan.method, plan.served)
