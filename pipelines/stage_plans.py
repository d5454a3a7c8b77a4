"""What every stage of a run will do, decided and checked before any model loads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipelines.settings import Settings
from student_train.cache import Cache
from student_train.compression import asked_for
from student_train.compressors import CompressorSpec
from student_train.config import StageSettings, TrainSettings
from student_train.methods import Method, create_method, hook, looks_at_images, method_module, text_methods
from student_train.needs import ROW_ALIGNED, Served, serve
from student_train.stages import Stage, parse_stages, stages_of_text
from student_train.student import open_student
from teacher_cache.errors import CacheError, CompatibilityError, KdcliError
from teacher_cache.fingerprint import is_text_alone
from teacher_cache.model_kind import open_config, reads_images
from teacher_cache.shards.commit import committed_shards


@dataclass(frozen=True)
class StagePlan:
    """One stage with everything decided: its settings, method, the fields that serve it, and what compresses vision tokens.

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

    def folder(self, output: Path) -> Path:
        return output / f"{self.number:02d}-{self.stage.name}"


def plan_stages(
    cache: Cache, method: str, settings: Settings, stages: str | None, preset: str, knobs: Mapping[str, Any] | None
) -> list[StagePlan]:
    """Decide every stage; refuses a method, knob, part or need that cannot be had."""
    module = method_module(method)
    shared = {**settings.methods.get(method, {}), **(knobs or {})}
    create_method(method, preset, shared)
    plain = create_method("sft")
    listed = parse_stages(stages or module.STAGES)
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
        merged = own.over(settings.train)
        if not merged.learning_rate:
            merged = replace(merged, learning_rate=stage.learning_rate)
        parts = own.parts or stage.parts
        if own.knobs and not stage.distils:
            raise KdcliError(f"stage {stage.name} is plain SFT: it has no knobs; give them to DPT or DFT")
        used = create_method(method, preset, {**shared, **(own.knobs or {})}) if stage.distils else plain
        params = {name: cache.fields[name]["params"] for name in complete_fields(cache, parts)}
        served = serve(used.needs(), params, method, str(cache.storage))
        compressor = asked_for(merged, getattr(module, "COMPRESSOR", None))
        name = method if stage.distils else "sft"
        plans.append(StagePlan(number, stage, merged, parts, name, used, served, compressor))
    return plans


def blind_side(cache: Cache, train: TrainSettings) -> str:
    """Which side reads text alone, in words: the student, or else the teacher whose rows the cache holds; "" for neither."""
    if train.student:
        what = f"student {train.student!r}"
        if not reads_images(open_config(what, train.student, trust_remote_code=train.trust_remote_code)):
            return what
    return f"the teacher of {cache.storage}" if is_text_alone(cache.plan.preparation) else ""


def refuse_blind(method: Method, name: str, blind: str) -> None:
    """CompatibilityError for a method that learns from vision tokens, where one side has none."""
    if looks_at_images(method):
        needs = sorted(str(need) for need in method.needs() if "vision" in need.what) or ["vision tokens to remove"]
        raise CompatibilityError(
            f"method {name} needs {', '.join(needs)}, and {blind} reads text alone: use {', '.join(text_methods())}"
        )


def complete_fields(cache: Cache, parts: tuple[str, ...]) -> list[str]:
    """Fields that every shard of the parts has; CacheError where ``samples`` itself is not complete."""
    shards = set(cache.shards(parts))
    missing = shards - set(committed_shards(cache.storage, "samples"))
    if missing:
        raise CacheError(
            f"{cache.storage}: {len(missing)} of {len(shards)} shards of part {', '.join(parts)} are not captured yet: "
            "run `kdcli cache-teacher` again to finish them"
        )
    found = [name for name in cache.fields if shards <= set(committed_shards(cache.storage, f"fields/{name}"))]
    if nameless := [name for name in found if not cache.fields[name]["teacher"]]:
        raise CacheError(f"{cache.storage}: field.json of {', '.join(nameless)} does not say which teacher made it")
    return found


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
    return bool(ROW_ALIGNED & plan.served.fields.keys()) and not hook(plan.method, "alignment")()
