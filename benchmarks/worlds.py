"""The models and rows that the benchmarks run on: the demo's own, or synthetic ones of real shapes (no downloads)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import real_shapes
from pipelines.capture.calibrate import calibrate
from pipelines.capture.describe import describe
from pipelines.capture.profiles import PROFILES
from pipelines.demo.write_world import write_world
from pipelines.settings import CaptureSettings
from teacher_cache.capturing.cache_shard import cache_shard
from teacher_cache.capturing.capture_job import CaptureJob
from teacher_cache.fields import CalibratedField, create_field
from teacher_cache.fields.calibration import Calibration
from teacher_cache.planning.make_plan import make_plan
from teacher_cache.planning.plan import Plan
from teacher_cache.planning.plan_file import write_plan
from teacher_cache.preparing.fingerprint import processor_fingerprint
from teacher_cache.preparing.prepare import Preparer
from teacher_cache.shards.storage import Storage
from teacher_cache.sources import DataSpec, open_source
from teacher_cache.teachers.transformers import TeacherSpec, TransformersTeacher, load_processor


@dataclass(frozen=True)
class World:
    """A mixture and the two models that read it.

    Attributes:
        teacher, student: build the model anew; both read what ``processor`` makes. image_tokens: vision tokens an image.
    """

    shapes: str
    device: str
    data: tuple[DataSpec, ...]
    processor: Any
    teacher_config: Any
    student_config: Any
    teacher: Callable[[], Any]
    student: Callable[[], Any]
    image_tokens: int
    notes: tuple[str, ...] = ()

    def describe(self) -> dict[str, Any]:
        text = {"teacher": self.teacher_config.get_text_config(), "student": self.student_config.get_text_config()}
        sizes = {name: f"{one.num_hidden_layers} layers × {one.hidden_size}" for name, one in text.items()}
        parameters = {"teacher": self.teacher_config, "student": self.student_config}
        return {
            **sizes,
            "parameters": {name: parameter_count(config) for name, config in parameters.items()},
            "vocabulary": len(self.processor.tokenizer),
            "vision_tokens": self.image_tokens,
            "notes": list(self.notes),
        }

    def open_capture(self) -> tuple[Plan, Preparer, TransformersTeacher]:
        """What a capture of this world works with; one shard a part."""
        preparer = Preparer(self.processor, self.teacher_config)
        plan = make_plan(self.data, len(self.data), preparer.fingerprint(), 0, image_tokens=self.image_tokens)
        return plan, preparer, TransformersTeacher.wrap(self.teacher(), self.processor)


def fit_fields(
    plan: Plan, preparer: Preparer, teacher: TransformersTeacher, fields: Mapping[str, CalibratedField]
) -> dict[str, Calibration]:
    """Calibrations on as many of the world's own rows as a capture takes by default."""
    settings = CaptureSettings()
    return calibrate(fields, plan, preparer, teacher, teacher.head, settings.calibration_rows, settings.batch_tokens)


def write_cache(
    world: World, capture: tuple[Plan, Preparer, TransformersTeacher], url: str, profile: str, names: Sequence[str]
) -> None:
    """A complete cache of some fields as a profile stores them, by the product's own line. capture: of ``open_capture``."""
    plan, preparer, teacher = capture
    fingerprint = {
        "weights": "benchmark",
        "head_width": teacher.vocabulary,
        "hidden_size": teacher.head.shape[1],
        "dtype": str(teacher.head.dtype).removeprefix("torch."),
        "attn_implementation": "sdpa",
        **processor_fingerprint(world.processor),
    }
    storage = Storage(url)
    write_plan(storage, plan)
    fields = {name: create_field(name, PROFILES[profile].get(name)) for name in names}
    fit = partial(fit_fields, plan, preparer, teacher)
    hashes, fields = describe(storage, plan, fields, fingerprint, world.processor, lambda: teacher.head, fit)
    job = CaptureJob(storage, plan, hashes, fields)
    for shard, columns in job.missing().items():
        cache_shard(job, shard, columns, open_source(plan.spec(plan.slices[shard].part)), preparer, teacher)


def parameter_count(config: Any) -> int:
    """Parameters of a model of this configuration, tied ones once; nothing is allocated."""
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    model.tie_weights()
    return sum(p.numel() for p in model.parameters())


def open_world(options: Any, folder: Path, rows: int) -> World:
    """A mixture of ``rows`` rows under ``folder`` with its models, as the command line says."""
    if options.shapes == "real":
        return _real_world(options.device, folder, rows, options.layers)
    return _demo_world(options.device, folder, rows, Path(options.models))


def _demo_world(device: str, folder: Path, rows: int, models: Path) -> World:
    from transformers import AutoModelForImageTextToText

    from benchmarks.demo_training.model import STUDENT, build_model

    captions = rows // 4
    paths = write_world(folder / "world", captions=captions, train=rows - captions, heldout=7, seed=0)
    processor, teacher_config = load_processor(TeacherSpec(str(models / "teacher")))

    def teacher() -> Any:
        return AutoModelForImageTextToText.from_pretrained(models / "teacher", dtype=torch.float32).to(device)

    def student() -> Any:
        if (models / "student_start").is_dir():
            return AutoModelForImageTextToText.from_pretrained(models / "student_start", dtype=torch.float32)
        return build_model(STUDENT, processor.tokenizer, 0)

    return World(
        "demo",
        device,
        (
            DataSpec("caption", str(paths.captions), image_root=str(paths.images), template="plain"),
            DataSpec("sft", paths.train, template="chat"),
        ),
        processor,
        teacher_config,
        student().config,
        teacher,
        student,
        teacher_config.image_seq_length,
        () if (models / "student_start").is_dir() else ("student: random weights of the demo student's size",),
    )


def _real_world(device: str, folder: Path, rows: int, layers: int | None) -> World:
    processor = real_shapes.processor()
    teacher, student = (real_shapes.config(size, processor.tokenizer, layers) for size in ("7B", "0.5B"))
    mixture = real_shapes.write_rows(folder / "world", max(rows, real_shapes.LEAST_ROWS))
    data = DataSpec("sft", str(mixture), image_root=str(folder / "world"))
    return World(
        "real",
        device,
        (data,),
        processor,
        teacher,
        student,
        lambda: real_shapes.build(teacher, torch.bfloat16, device),
        lambda: real_shapes.build(student, torch.float32, device),
        teacher.image_seq_length,
        ("random weights", *((f"{layers} layers a tower: a dry run, not a measurement",) if layers else ())),
    )
