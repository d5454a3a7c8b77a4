"""The trainer of one stage, put together: student, learned maps, teacher's side, stream; what cannot be trained is refused here."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pipelines.train.stage_plans import StagePlan
from student_train.dataset import TrainBatch, TrainDataset
from student_train.distributed import Processes
from student_train.learned_maps import learned_maps
from student_train.load_student import freeze_except, share
from student_train.methods import looks_at_images
from student_train.needs import Served
from student_train.order import MicroBatches, Order
from student_train.packed_samples import chosen_packing
from student_train.selection import columns_of, weigher
from student_train.stream import step_batches
from student_train.student import RowForward
from student_train.student_rows import student_rows
from student_train.teacher_view import TeacherHeads
from student_train.trainer import Trainer
from teacher_cache.errors import CompatibilityError, KdcliError
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.reading.cached_samples import CachedSamples

PROBED = 512
"""Rows looked through for an image before the first step."""
MAPS = "maps.safetensors"
"""Beside a stage's model: the method's learned maps, which are no part of the student; the next stage goes on with them."""
OpenSignals = Callable[[TeacherCache, Served, torch.device], Any]
"""(cache, served fields, device) → what has ``view(batch)``: ``TeacherHeads.open``, or a live teacher to compare with."""


def make_trainer(
    cache: TeacherCache,
    plan: StagePlan,
    rows: CachedSamples,
    model: Any,
    processor: Any,
    total: int,
    global_batch: int,
    processes: Processes,
    folder: Path,
    open_signals: OpenSignals = TeacherHeads.open,
    maps_before: Path | None = None,
) -> tuple[Trainer, Callable[[int], Iterator[tuple[int, list[TrainBatch]]]]]:
    """The trainer of a stage and its stream of batches from any step on.

    Args:
        maps_before: learned maps that the stage goes on with, where they are its own ones.
    """
    tower = plan.settings.vision_tower_learning_rate and "language_model" in plan.stage.trains
    freeze_except(model, (*plan.stage.trains, "vision_tower") if tower else plan.stage.trains)
    if plan.settings.gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    maps = learned_maps(cache, plan.served, plan.method, plan.method_name, plan.settings.seed, model)
    student = RowForward(model, maps)
    if maps_before:
        load_maps(maps_before, student.maps)
    if not plan.settings.fsdp:  # which brings the shards alone to the device
        student = student.to(processes.device)
    signals = open_signals(cache, plan.served, processes.device)
    selection, length = plan.terms.selection, plan.settings.max_length
    order, asked = Order(rows.counts, plan.settings.seed), (plan.method, plan.served)
    given = (cache, plan.parts, rows, order, processor, model.config)
    dataset = student_rows(*given, *asked, max_length=length, columns=columns_of(selection))
    check_rows(dataset, plan)
    micro = plan.settings.per_device_train_batch_size
    packing = chosen_packing(student, plan.method, plan.settings)

    def lengths(positions: Sequence[int]) -> list[int]:
        return rows.tokens([order.at(one) for one in positions])

    def positions(first: int) -> MicroBatches:
        return MicroBatches(
            total, global_batch, micro, processes.rank, processes.world, first, lengths, packing is not None
        )

    def batches_from(first: int) -> Iterator[tuple[int, list[TrainBatch]]]:
        pad_id = processor.tokenizer.pad_token_id or 0
        return step_batches(dataset, positions(first), pad_id, plan.settings.dataloader_num_workers, packing)

    trainer = Trainer(student, plan.method, signals.view, plan.settings, processes, folder, positions(0).steps())
    trainer.schedules = plan.terms.schedules
    if selection:
        trainer.weigh = weigher(selection, signals.likeliest, processes.device)
    return trainer, batches_from


def save_maps(file: Path, maps: Mapping[str, torch.Tensor], before: Path) -> None:
    """A stage without maps of its own hands those of the stage before (``before``) on: SFT between DPT and DFT forgets nothing."""
    if not maps and before.is_file() and before != file:
        shutil.copyfile(before, file)
    if tensors := {name: one.detach().cpu().contiguous() for name, one in maps.items()}:
        save_file(tensors, file)
        share([file])
    if file.is_file():
        with file.open("rb") as written:
            os.fsync(written.fileno())


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """KdcliError naming the file where it is no safetensors file; nothing else is ever read as tensors."""
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise KdcliError(f"{path}: cannot be read ({error}): remove its folder to do that part again") from None


def load_maps(file: Path, maps: torch.nn.Module) -> None:
    """The maps of the stage before, where it had the same ones; else they begin afresh."""
    if not file.is_file():
        return
    tensors, own = read_tensors(file), maps.state_dict()
    if {name: one.shape for name, one in tensors.items()} == {name: one.shape for name, one in own.items()}:
        maps.load_state_dict(tensors)


def check_rows(dataset: TrainDataset, plan: StagePlan) -> None:
    """A row of every part, with an image where the stage looks at one, read before the first step: what cannot be aligned or trained
    is refused here.

    Raises:
        CompatibilityError: the row's own; or the stage needs images and none of the first ``PROBED`` rows has one.
    """
    sees_images = plan.stage.trains == ("projector",) or looks_at_images(plan.method)
    without = set(plan.parts)
    for position in range(min(PROBED, dataset.order.rows)):
        row = dataset[position]
        if getattr(plan.method, "text", "") == "all" and not torch.equal(row.text.ids, row.prepared.text.ids):
            raise CompatibilityError(
                f"row {row.prepared.key}: teacher and student read other prompts, and text=all compares them token by token: "
                "--set text=response, or the teacher's chat template for the student"
            )
        if len(row.prepared.vision_positions) or not sees_images:
            without.discard(row.prepared.part)
            if not without:
                return
    if sees_images and without == set(plan.parts):
        raise CompatibilityError(
            f"stage {plan.stage.name}: none of the first {PROBED} rows of part {', '.join(plan.parts)} has an image, "
            f"and {plan.method_name} learns from vision tokens there: leave the stage out of --stages, or choose other parts"
        )
