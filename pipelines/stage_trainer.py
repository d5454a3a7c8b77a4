"""The trainer of one stage, put together: student, learned maps, teacher's side, stream; what cannot be trained is refused here."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pipelines.stage_plans import StagePlan, row_aligned
from student_train.cache import Cache, CachedRows
from student_train.compression import compressor_of, with_grid
from student_train.distributed import Processes
from student_train.methods import hook, looks_at_images
from student_train.needs import Served
from student_train.stream import MicroBatches, Order, TrainBatch, TrainDataset, step_batches
from student_train.student import RowForward, freeze_except, share
from student_train.teacher_view import TeacherSignals
from student_train.trainer import Trainer
from teacher_cache.errors import CompatibilityError, KdcliError
from teacher_cache.known_text import same_text_side
from teacher_cache.prepare import Preparer

STATES = ("vision_hidden", "response_hidden", "vision_features")
"""Fields whose rows are as wide as the teacher."""
PROBED = 512
"""Rows looked through for an image before the first step."""
MAPS = "maps.safetensors"
"""Beside a stage's model: the method's learned maps, which are no part of the student; the next stage goes on with them."""
OpenSignals = Callable[[Cache, Served, torch.device], Any]
"""(cache, served fields, device) → what has ``view(batch)``: ``TeacherSignals.open``, or a live teacher to compare with."""


def make_trainer(
    cache: Cache,
    plan: StagePlan,
    rows: CachedRows,
    model: Any,
    processor: Any,
    total: int,
    global_batch: int,
    processes: Processes,
    folder: Path,
    open_signals: OpenSignals = TeacherSignals.open,
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
    student = RowForward(model, learned_maps(cache, plan, model))
    if maps_before:
        load_maps(maps_before, student.maps)
    if not plan.settings.fsdp:  # which brings the shards alone to the device
        student = student.to(processes.device)
    signals = open_signals(cache, plan.served, processes.device)
    # A row that the capture cut at a turn border must be cut at the same border here.
    reader = with_grid(processor, compressor_of(model.config), training=True)
    preparer = Preparer.like(cache.plan.preparation, reader, model.config, plan.settings.max_length)
    templates = {part: cache.template(part) for part in plan.parts}
    matching = hook(plan.method, "alignment")()
    same_grid = row_aligned(plan)
    order = Order(rows.counts, plan.settings.seed)
    check_layouts = matching.check_layouts if matching else None
    known_text = same_text_side(preparer.fingerprint(), cache.plan.preparation)
    dataset = TrainDataset(rows, order, preparer, templates, cache.image_limits(), same_grid, check_layouts, known_text)
    check_rows(dataset, plan)
    micro = plan.settings.per_device_train_batch_size

    def positions(first: int) -> MicroBatches:
        return MicroBatches(total, global_batch, micro, processes.rank, processes.world, first)

    def batches_from(first: int) -> Iterator[tuple[int, list[TrainBatch]]]:
        pad_id = processor.tokenizer.pad_token_id or 0
        return step_batches(dataset, positions(first), pad_id, plan.settings.dataloader_num_workers)

    trainer = Trainer(student, plan.method, signals.view, plan.settings, processes, folder, positions(0).steps())
    return trainer, batches_from


def learned_maps(cache: Cache, plan: StagePlan, model: Any) -> dict[str, torch.nn.Module]:
    """The method's maps between hidden states of the student and of the teacher whose fields serve it; none for most methods.

    Fresh weights are a function of the seed, whatever was drawn before.

    Raises:
        CompatibilityError: the states that the method maps are of teachers of several widths.
    """
    fields = sorted({name for need in STATES for name in plan.served.fields.get(need, ())})
    widths = {name: cache.fields[name]["teacher"]["hidden_size"] for name in fields}
    if not widths:
        return {}
    if len(set(widths.values())) > 1:
        told = ", ".join(f"{name} {width}" for name, width in widths.items())
        raise CompatibilityError(
            f"{cache.storage}: {plan.method_name} maps hidden states of one width; its fields have several ({told}): "
            "add them by one teacher"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.settings.seed)
        width = next(iter(widths.values()))
        return hook(plan.method, "maps")(model.config.get_text_config().hidden_size, width) or {}


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
