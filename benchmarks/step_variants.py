"""The four ways to take one optimizer step that ``benchmarks.step`` compares, built from the product's own pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.worlds import World
from pipelines.describe import describe
from pipelines.settings import Settings
from pipelines.stage_plans import plan_stages
from pipelines.train_student import make_trainer
from student_train.cache import Cache, CachedRows
from student_train.config import TrainSettings
from student_train.distributed import Processes
from student_train.stream import TrainBatch
from student_train.teacher_view import Served, TeacherSignals, TeacherView
from student_train.trainer import Trainer
from teacher_cache.cache_shard import CaptureJob, cache_shard
from teacher_cache.fields import create_field
from teacher_cache.fingerprint import processor_fingerprint
from teacher_cache.plan import make_plan, write_plan
from teacher_cache.prepare import Preparer
from teacher_cache.shards.storage import Storage
from teacher_cache.sources import open_source
from teacher_cache.teachers.transformers import TransformersTeacher

SFT, CACHED, LIVE, TOPK = "sft", "llava-kd cached", "llava-kd live", "llava-kd top-k"
VARIANTS = (SFT, CACHED, LIVE, TOPK)
FIELDS_OF = {
    SFT: (),
    CACHED: ("response_hidden", "vision_hidden"),
    LIVE: ("response_hidden", "vision_hidden"),  # made by the forward of each step, not read
    TOPK: ("response_topk", "vision_topk", "relation"),
}


@dataclass(frozen=True)
class Variant:
    """A trainer with its stream; ``steps(n)`` are the first n steps' batches, the same rows in every variant."""

    name: str
    trainer: Trainer
    batches_from: Callable[[int], Iterator[tuple[int, list[TrainBatch]]]]

    def steps(self, count: int) -> list[list[TrainBatch]]:
        return [batches for _, batches in islice(self.batches_from(0), count)]

    def run(self, steps: list[list[TrainBatch]]) -> None:
        for number, batches in enumerate(steps):
            self.trainer.step(number, batches)

    def run_with_loading(self, count: int) -> None:
        for number, batches in islice(self.batches_from(0), count):
            self.trainer.step(number, batches)

    def flops(self, batches: list[TrainBatch]) -> int:
        """Multiply-adds × 2 of every matrix product, convolution and attention of one real step, forward and backward.

        Counted by dispatch, so recomputation and chunks count as they run; element-wise work does not count.
        """
        with FlopCounterMode(display=False, custom_mapping=EXTRA_FLOPS) as counter:
            self.trainer.step(0, batches)
        return counter.get_total_flops()


def _addmm_inplace_flop(total: Any, a: Any, b: Any, **kwargs: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


def _cpu_attention_flop(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    b, h, q, d = query
    return 2 * b * h * q * key[2] * (d + value[3])


def _cpu_attention_backward_flop(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Scores again, then dV, dP, dQ, dK."""
    b, h, q, d = query
    return 2 * b * h * q * key[2] * (3 * d + 2 * value[3])


EXTRA_FLOPS = {
    torch.ops.aten.addmm_: _addmm_inplace_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward_flop,
}


def write_cache(world: World, url: str) -> None:
    """Every field that some variant reads, captured by the product's own line from the world's teacher."""
    storage = Storage(url)
    preparer = Preparer(world.processor, world.teacher_config)
    plan = make_plan(world.data, len(world.data), preparer.fingerprint(), 0, image_tokens=world.image_tokens)
    write_plan(storage, plan)
    teacher = TransformersTeacher.wrap(world.teacher(), world.processor)
    fingerprint = {
        "weights": "benchmark",
        "head_width": teacher.vocabulary,
        "hidden_size": teacher.head.shape[1],
        **processor_fingerprint(world.processor),
    }
    names = sorted({name for fields in FIELDS_OF.values() for name in fields})
    fields = {name: create_field(name) for name in names}
    hashes = describe(storage, plan, fields, fingerprint, world.processor, lambda: teacher.head)
    job = CaptureJob(storage, plan, hashes, fields)
    for shard, columns in job.missing().items():
        source = open_source(plan.spec(plan.slices[shard].part))
        cache_shard(job, shard, columns, source, preparer, teacher)


class LiveTeacher:
    """The cached run's own ``TeacherSignals``, fed by the teacher's forward on the batch instead of by stored fields."""

    def __init__(self, teacher: TransformersTeacher, served: Served, device: torch.device):
        self.teacher, self.device = teacher, device
        heads = dict.fromkeys(FIELDS_OF[LIVE], teacher.head)
        self.signals = TeacherSignals(served, heads, teacher.vocabulary, device)

    def view(self, batch: TrainBatch) -> TeacherView:
        moved = batch.batch.to(self.device)
        states = self.teacher.hidden(moved)
        fields = {
            f"{kind}_hidden": list(states[moved.rows[kind]].float().split(list(moved.counts[kind])))
            for kind in ("response", "vision")
        }
        return self.signals.view(replace(batch, fields=fields))


def build_variant(name: str, world: World, url: str, batch: int, workers: int, steps: int) -> Variant:
    """The trainer of one variant on a fresh student."""
    cache = Cache(url)
    cache.fields = {field: body for field, body in cache.fields.items() if field in FIELDS_OF[name]}
    settings = TrainSettings(
        student="benchmark",
        per_device_train_batch_size=batch,
        learning_rate=1e-5,
        dataloader_num_workers=workers,
        bf16=world.device.startswith("cuda"),
        report_to="none",
    )
    method, stage = ("sft", "SFT") if name == SFT else ("llava-kd", "DFT")
    (plan,) = plan_stages(cache, method, Settings(train=settings), stage, "paper", None)
    served = plan.served
    if name == LIVE:
        plan = replace(plan, served=Served({}, ()))
    rows = CachedRows(cache, plan.parts, plan.served.names)
    device = torch.device(world.device)
    processes = Processes(0, 1, device)
    total = batch * steps
    trainer, batches_from = make_trainer(
        cache, plan, rows, world.student(), world.processor, total, batch, processes, Path(url) / "run"
    )
    if name == LIVE:
        trainer.see_teacher = LiveTeacher(
            TransformersTeacher.wrap(world.teacher(), world.processor), served, device
        ).view
    trainer.model.train()
    return Variant(name, trainer, batches_from)
