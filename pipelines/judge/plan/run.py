"""``kdcli plan``: rows, tokens, bytes by column, shards and hours of a capture, before any GPU is touched and without weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pipelines.capture.profiles import chosen_fields
from pipelines.judge.plan.assumed import assumed
from pipelines.judge.plan.column_sizes import ColumnEstimate, sampling_error
from pipelines.judge.plan.lengths import Lengths, part_lengths
from pipelines.judge.plan.mixture_sample import Few, PartSample, sample_mixture
from pipelines.judge.plan.notes import notes
from pipelines.judge.plan.teacher_cost import Speed, head_rows, model_size
from pipelines.judge.plan.weighing import Weigher
from pipelines.judge.preflight.budget import Budget
from pipelines.judge.preflight.steps import pick, saved_steps, step_lines
from pipelines.settings import CaptureSettings
from teacher_cache.errors import KdcliError
from teacher_cache.fields import Field, create_field, wants_of
from teacher_cache.preparing.prepare import Limits, Preparer
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.sources import DataSpec
from teacher_cache.teachers.backends import load_processor
from teacher_cache.teachers.label_ends import LabelEnds, label_ends
from teacher_cache.teachers.transformers import TeacherSpec


@dataclass(frozen=True)
class PlanRequest:
    """What the user asks about: the same words as a capture, and what only an estimate needs.

    Attributes:
        rows: part → rows of the whole mixture, of which the files hold a few. sample: rows prepared. like: cache to measure bytes on.
        budget: takes a step of what the preflight measured, in place of parameters.
    """

    teacher: TeacherSpec
    data: tuple[DataSpec, ...]
    settings: CaptureSettings
    field_params: Mapping[str, Mapping[str, Any]]
    rows: Mapping[str, int]
    sample: int = 512
    like: str | None = None
    speed: Speed = field(default_factory=Speed)
    budget: Budget = field(default_factory=Budget)


@dataclass(frozen=True)
class Estimate:
    """Everything that ``kdcli plan`` says; bytes are bytes, hours are hours, ``uncertainty`` is relative (95 %, of the sample alone).

    ``assumes``: see ``assumed.assumed``. ``chosen``: lines of ``steps.step_lines``, where a budget chose. ``warnings``: what keeps students
    from learning to stop.
    """

    teacher: str
    parts: tuple[dict[str, Any], ...]
    lengths: tuple[Lengths, ...]
    columns: tuple[ColumnEstimate, ...]
    once: dict[str, int]
    bytes: int
    uncertainty: float
    shards: int
    tokens: int
    hours: dict[str, Any]
    assumes: dict[str, Any]
    chosen: tuple[str, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def estimate(request: PlanRequest, progress: Callable[[int, int], None] = lambda done, total: None) -> Estimate:
    """Reads configuration and processor of the teacher, scans the mixture, prepares ``request.sample`` rows; writes nothing."""
    settings = request.settings
    processor, config = load_processor(request.teacher)
    images = processor.image_processor is not None
    width = int(config.get_text_config().hidden_size)
    steps, at = chosen_step(request, width)
    params = {**request.field_params, **(steps[at]["fields"] if steps else {})}
    wanted = chosen_fields(settings.store, settings.fields, params, images)
    like = open_like(request.like, width) if request.like else None
    bare = frozenset(settings.parts_without_fields)
    measured = steps[at]["field_bytes"] if steps else {}
    weigher = Weigher(request.teacher, processor, config, (), bare, settings.shards, like, measured)
    weigher.sizes(
        {name: create_field(name, params) for name, params in wanted.items()}
    )  # what cannot be sized, before rows are read
    preparer = Preparer(processor, config, Limits(settings.max_length, settings.over_length))
    for template in sorted({spec.template for spec in request.data}):
        preparer.check_template(template)
    ends = label_ends(request.teacher, preparer)
    if unknown := bare - {spec.part for spec in request.data}:
        raise KdcliError(f"parts_without_fields names {', '.join(sorted(unknown))}, which is not a part of the mixture")
    few = Few(request.sample, settings.seed, settings.shards)
    parts = sample_mixture(request.data, preparer, request.rows, few, progress, ends)
    if not sum(len(part.usable) for part in parts):
        raise KdcliError("no sampled row is usable: run `kdcli doctor`")
    weigher = replace(weigher, parts=parts)
    found, full = weigher.weigh(wanted), weigher.full
    fields, sizes, columns = found.fields, found.sizes, found.columns
    templates = {spec.part: spec.template for spec in request.data}
    return Estimate(
        teacher=request.teacher.id,
        parts=tuple(part_summary(part) for part in parts),
        lengths=tuple(one for part in parts for one in part_lengths(part)),
        columns=columns,
        once=found.once,
        bytes=found.bytes,
        uncertainty=sampling_error(parts, set(bare), sizes) / max(1, found.bytes),
        shards=settings.shards,
        tokens=round(sum(part.total(lambda row: row.tokens) for part in full)),
        hours=hours(request, config, weigher.vocabulary, fields, parts),
        assumes=assumed(settings, params, wanted, weigher),
        chosen=tuple(step_lines(steps, at, found.bytes, found.columns[0].samples)) if steps else (),
        warnings=tuple(line for part in parts for line in end_warnings(part, templates[part.part], ends)),
        notes=tuple(notes(settings, request.speed.gpus, fields, sizes, parts, full, columns, like, width)),
    )


def chosen_step(request: PlanRequest, width: int) -> tuple[list[dict[str, Any]], int]:
    """(what the preflight measured, the step that the budget takes); nothing where none is given."""
    if not request.budget.asked():
        return [], 0
    steps = saved_steps(request.settings.calibration, width)
    return steps, pick(steps, request.budget)


def end_warnings(part: PartSample, template: str, ends: LabelEnds) -> list[str]:
    """What keeps students of this part from learning to stop."""
    found = Counter((row.end.kind, row.end.last) for row in part.usable if row.end)
    return ends.warnings(part.part, template, found, len(part.usable))


def open_like(url: str, width: int) -> TeacherCache:
    """The cache to measure bytes on; KdcliError where its teacher is of another width, which its bytes a row would be too."""
    like = TeacherCache(url)
    for name, body in like.fields.items():
        there = body["teacher"]["hidden_size"]
        if there != width:
            raise KdcliError(
                f"--like {url}: {name} is of a teacher {there} wide, this one is {width}: leave --like out"
            )
    return like


def part_summary(part: PartSample) -> dict[str, Any]:
    """What the table says of one part."""
    return {
        "part": part.part,
        "rows": part.rows,
        "rows_in_files": part.scanned,
        "rows_prepared": part.read,
        "usable_rows": round(part.total(lambda row: 1)),
        "tokens": round(part.total(lambda row: row.tokens)),
        "image_bytes": round(part.total(lambda row: row.image_bytes)),
        "cut_rows": round(part.total(lambda row: bool(row.cut[0]))),
        "cut_images": round(part.total(lambda row: row.cut[1])),
        "skipped_share": part.skips(),
    }


def hours(
    request: PlanRequest, config: Any, vocabulary: int, fields: Mapping[str, Field], parts: Sequence[PartSample]
) -> dict[str, Any]:
    """GPU-hours and wall-clock hours of the teacher, none where no field asks it; hours of preparing rows, one process a GPU."""
    speed, bare = request.speed, request.settings.parts_without_fields
    asked = [part for part in parts if fields and part.part not in bare]
    flops = 0.0
    if asked and speed.tokens_per_second is None:
        model = model_size(request.teacher, config, vocabulary)
        wants = wants_of(fields.values())
        flops = sum(
            part.total(lambda row: model.flops(row.tokens, row.patches, head_rows(wants, row.counts))) for part in asked
        )
    gpu = speed.gpu_hours(sum(part.total(lambda row: row.tokens) for part in asked), flops)
    preparation = sum(part.weight * part.seconds for part in parts) / 3600
    return {
        "gpu_hours": gpu,
        "wall_hours": gpu / speed.gpus,
        "gpus": speed.gpus,
        "basis": speed.basis if asked else "no field: the teacher does not run",
        "flops": flops or None,
        "preparation_process_hours": preparation,
        "preparation_wall_hours": preparation / speed.gpus,
    }
