"""The trainer of one stage, put together: student, learned maps, teacher's side, stream; what cannot be trained is refused here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pipelines.stage_plans import StagePlan, row_aligned
from student_train.cache import Cache, CachedRows
from student_train.compression import compressor_of, with_grid
from student_train.distributed import Processes
from student_train.methods import hook
from student_train.needs import Served
from student_train.stream import MicroBatches, Order, TrainBatch, TrainDataset, step_batches
from student_train.student import RowForward, freeze_except
from student_train.teacher_view import TeacherSignals
from student_train.trainer import Trainer
from teacher_cache.errors import CompatibilityError
from teacher_cache.prepare import Limits, Preparer

STATES = ("_hidden", "_features")
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
) -> tuple[Trainer, Callable[[int], Iterator[tuple[int, list[TrainBatch]]]]]:
    """The trainer of a stage and its stream of batches from any step on."""
    freeze_except(model, plan.stage.trains)
    if plan.settings.gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    student = RowForward(model, learned_maps(cache, plan, model)).to(processes.device)
    signals = open_signals(cache, plan.served, processes.device)
    # A row that the capture cut at a turn border must be cut at the same border here.
    limits = Limits(plan.settings.max_length, cache.plan.preparation["over_length"])
    preparer = Preparer(with_grid(processor, compressor_of(model.config), training=True), model.config, limits)
    templates = {part: cache.template(part) for part in plan.parts}
    matching = hook(plan.method, "alignment")()
    same_grid = row_aligned(plan)
    order = Order(rows.counts, plan.settings.seed)
    check_layouts = matching.check_layouts if matching else None
    dataset = TrainDataset(rows, order, preparer, templates, cache.image_limits(), same_grid, check_layouts)
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
    """
    widths = [cache.fields[name]["teacher"]["hidden_size"] for name in plan.served.names if name.endswith(STATES)]
    if not widths:
        return {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.settings.seed)
        return hook(plan.method, "maps")(model.config.get_text_config().hidden_size, widths[0]) or {}


def save_maps(file: Path, maps: torch.nn.Module) -> None:
    if tensors := {name: one.detach().cpu().contiguous() for name, one in maps.state_dict().items()}:
        save_file(tensors, file)


def load_maps(file: Path, maps: torch.nn.Module) -> None:
    """The maps of the stage before, where it had the same ones; else they begin afresh."""
    if not file.is_file():
        return
    tensors, own = load_file(file), maps.state_dict()
    if {name: one.shape for name, one in tensors.items()} == {name: one.shape for name, one in own.items()}:
        maps.load_state_dict(tensors)


def check_rows(dataset: TrainDataset, plan: StagePlan) -> None:
    """The first row with an image, read before the first step: what cannot be aligned or trained is refused here, not hours later.

    Raises:
        CompatibilityError: the row's own; or the stage needs images and none of the first ``PROBED`` rows has one.
    """
    sees_images = plan.stage.trains == ("projector",) or any(n.what.startswith("vision") for n in plan.method.needs())
    for position in range(min(PROBED, dataset.order.rows)):
        if len(dataset[position].prepared.vision_positions):
            return
    if sees_images:
        raise CompatibilityError(
            f"stage {plan.stage.name}: none of the first {PROBED} rows of part {', '.join(plan.parts)} has an image, "
            f"and {plan.method_name} learns from vision tokens there: leave the stage out of --stages, or choose other parts"
        )
