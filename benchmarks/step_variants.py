"""The ways to take one optimizer step that ``benchmarks.step`` compares, built from the product's own pieces."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.coding_cost import BatchDecoder
from benchmarks.live_teacher import LiveTeacher
from benchmarks.stage_trainers import open_stage
from benchmarks.worlds import World, write_cache
from student_train.dataset import TrainBatch
from student_train.teacher_view import Served
from student_train.trainer import Trainer
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.teachers.transformers import TransformersTeacher

SFT, EXACT, STANDARD = "sft", "llava-kd exact", "llava-kd standard"
LIVE, COMPACT = "llava-kd live", "llava-kd compact"
VARIANTS = (SFT, EXACT, STANDARD, LIVE, COMPACT)
CACHED = (EXACT, STANDARD, COMPACT)
HIDDEN, TOPK = ("response_hidden", "vision_hidden"), ("response_topk", "vision_topk")
FIELDS_OF = {
    SFT: (),
    EXACT: HIDDEN,
    STANDARD: (*TOPK, *HIDDEN),
    LIVE: HIDDEN,  # made by the forward of each step, not read
    COMPACT: (*TOPK, "relation"),  # the profile alone has no relations
}
STORE_OF = {SFT: "exact", EXACT: "exact", STANDARD: "standard", LIVE: "exact", COMPACT: "compact"}
"""Variant → the profile whose fields it reads, and the folder of its cache."""


@dataclass(frozen=True)
class Variant:
    """A trainer with its stream; ``steps(n)`` are the first n steps' batches, the same rows in every variant.

    first_step: the number of the first of them in its stage, which schedules and draws follow.
    """

    name: str
    trainer: Trainer
    batches_from: Callable[[int], Iterator[tuple[int, list[TrainBatch]]]]
    decoder: BatchDecoder | None = None
    first_step: int = 0

    def steps(self, count: int) -> list[list[TrainBatch]]:
        return [batches for _, batches in islice(self.batches_from(0), count)]

    def run(self, steps: list[list[TrainBatch]]) -> None:
        for number, batches in enumerate(steps, self.first_step):
            self.trainer.step(number, batches)

    def run_with_loading(self, count: int) -> None:
        for number, batches in islice(self.batches_from(0), count):
            self.trainer.step(number, batches)

    def decode(self, steps: list[list[TrainBatch]]) -> dict[str, float]:
        """Seconds of one thread for what these steps' batches read of the teacher."""
        assert self.decoder is not None
        return self.decoder.seconds([batch.batch.keys for batches in steps for batch in batches])

    def flops(self, batches: list[TrainBatch]) -> int:
        """Multiply-adds × 2 of every matrix product, convolution and attention of one real step, forward and backward.

        Counted by dispatch, so recomputation and chunks count as they run; element-wise work does not count.
        """
        with FlopCounterMode(display=False, custom_mapping=EXTRA_FLOPS) as counter:
            self.trainer.step(self.first_step, batches)
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


def write_caches(world: World, url: str) -> None:
    """One cache a profile, by the product's own line, of the fields that some variant reads."""
    capture = world.open_capture()
    for name in CACHED:
        write_cache(world, capture, f"{url}/{STORE_OF[name]}", STORE_OF[name], FIELDS_OF[name])
    del capture
    gc.collect()  # modules refer to each other; a GPU has no room for a teacher that nobody asks any more
    torch.cuda.empty_cache()


def build_variant(name: str, world: World, url: str, batch: int, workers: int, steps: int) -> Variant:
    """The trainer of one variant on a fresh student."""
    cache = TeacherCache(f"{url}/{STORE_OF[name]}")
    cache.fields = {field: body for field, body in cache.fields.items() if field in FIELDS_OF[name]}
    method = "sft" if name == SFT else "llava-kd"
    served = Served({}, ()) if name == LIVE else None
    plan, trainer, batches_from = open_stage(world, cache, method, batch, steps, workers=workers, served=served)
    if name == LIVE:
        trainer.see_teacher = LiveTeacher(
            TransformersTeacher.wrap(world.teacher(), world.processor), torch.device(world.device)
        ).view
    decoder = BatchDecoder(cache, plan.served.names, plan.parts) if name in CACHED else None
    return Variant(name, trainer, batches_from, decoder)
