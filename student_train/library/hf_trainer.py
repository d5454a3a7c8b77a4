"""``transformers.Trainer`` whose loss is any method's, from a cache: optimizer, schedule, logging, checkpoints are transformers'."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainingArguments
from transformers.utils import is_accelerate_available

from student_train.library.cache import Cache
from student_train.library.collator import Collator
from student_train.library.dataset import CacheDataset, CacheStream, NumberedRows
from student_train.library.step_loss import StepLoss
from student_train.methods import DEFAULT, Method
from student_train.order import MicroBatches
from teacher_cache.errors import KdcliError

MAPS = "maps.safetensors"
"""In a checkpoint: the method's learned maps, which are no part of the student."""


class DistillTrainer(Trainer):
    """Trains a model on a teacher cache with the loss of a method: the parameters of ``model`` that have ``requires_grad``.

    Step n uses the samples of step n of ``kdcli train-student`` with the same seed, batch size and number of processes, and has its
    gradients: means run over all positions of the step, with ``gradient_accumulation_steps`` and under torchrun (DDP) too. A resumed run
    continues exactly. Evaluation computes the model's own cross-entropy. A run is one stage: freeze what must not train.

    Args:
        model: a Hugging Face model, or a ``PeftModel``.
        args: ``TrainingArguments``; ``remove_unused_columns`` is set to False.
        train_dataset: ``Cache.dataset(…, method=…)``; or in its place
        cache: an open cache or its address, with ``method`` (a name with ``preset`` and ``knobs``, or an object), ``parts`` (None: all) and
            ``processing_class``, the student's processor.
        eval_dataset: a ``Cache.dataset``. others: arguments of ``transformers.Trainer``.

    Raises:
        KdcliError: accelerate is missing; fp16, DeepSpeed or FSDP is asked for; the dataset has no method.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments | None = None,
        *,
        train_dataset: CacheDataset | None = None,
        cache: Cache | str | None = None,
        method: str | Method | None = None,
        processing_class: Any = None,
        parts: Sequence[str] | None = None,
        preset: str = DEFAULT,
        knobs: Mapping[str, Any] | None = None,
        **others: Any,
    ):
        if not is_accelerate_available():
            raise KdcliError("DistillTrainer: transformers.Trainer needs accelerate: pip install 'kdcli[trainer]'")
        if taken := sorted({"compute_loss_func", "model_init"} & others.keys()):
            raise KdcliError(f"DistillTrainer: {', '.join(taken)} cannot be given: the loss is the method's")
        if (train_dataset is None) == (cache is None):
            raise KdcliError(
                "DistillTrainer: give train_dataset=cache.dataset(…, method=…), or cache=, method= and processing_class="
            )
        if train_dataset is None:
            opened = Cache(cache) if isinstance(cache, str) else cache
            assert opened is not None, "one of the two is there"
            asked: dict[str, Any] = {"method": method, "preset": preset, "knobs": knobs}
            train_dataset = opened.dataset(parts, processor=processing_class, config=model.config, **asked)
        self.rows = train_dataset
        if self.rows.request.method is None:
            raise KdcliError("DistillTrainer: the dataset was made for needs: cache.dataset(…, method=…)")
        processing_class = processing_class or self.rows.processor
        args = args or TrainingArguments(output_dir="tmp_trainer")
        if args.fp16 or args.deepspeed or args.fsdp:
            raise KdcliError(
                "DistillTrainer: fp16, deepspeed and fsdp are not supported: take bf16, or `kdcli train-student --fsdp`"
            )
        args.remove_unused_columns = False
        collator = others.pop("data_collator", None) or Collator(self.rows)
        super().__init__(
            model, args, data_collator=collator, train_dataset=self.rows, processing_class=processing_class, **others
        )
        self.loss_is_scaled_for_ga = True
        self._loss: StepLoss | None = None
        self._terms: Counter[str] = Counter()
        self._steps_unlogged = 0
        """Each term's share of the loss in the steps since the last log, and how many they are."""
        self._shares: dict[int, tuple[Any, int, Any]] = {}
        """Teacher's side of a batch, by identity → (batch, its number in the step, how the step's rows count)."""

    @property
    def step_loss(self) -> StepLoss:
        """Made when training begins: what trains must be settled by then."""
        if self._loss is None:
            steps, how = self._steps(), {"bf16": self.args.bf16, "use_liger_kernel": self.args.use_liger_kernel}
            self._loss = StepLoss(self.model, self.rows, seed=self.args.seed, total_steps=steps, **how)
            self._load_maps(self._resumed)
        return self._loss

    model: Any  # a Hugging Face model, whose methods no type checker follows
    _resumed: str | None = None

    # ---- data: the order of train-student

    def get_train_dataloader(self) -> DataLoader:
        args, rows = self.args, len(self.rows)
        once = args.per_device_train_batch_size * args.world_size
        accumulated = args.gradient_accumulation_steps
        if args.max_steps <= 0 and args.num_train_epochs <= 1:
            batches, total = -(-rows // once), rows
        else:  # an epoch's last step is filled up from the next epoch
            batches = -(-rows // (once * accumulated)) * accumulated
            epochs = (
                -(-args.max_steps * accumulated // batches) if args.max_steps > 0 else -int(-args.num_train_epochs // 1)
            )
            total = epochs * batches * once
        seed = args.seed if args.data_seed is None else args.data_seed
        each = MicroBatches(total, once, args.per_device_train_batch_size, args.process_index, args.world_size, 0)
        return DataLoader(
            _CollatedBatches(CacheStream(self.rows, seed, each)),
            batch_sampler=_Numbers(batches),  # type: ignore[arg-type]
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and torch.accelerator.is_available(),
        )

    def _steps(self) -> int:
        """Optimizer steps of the run."""
        return int(self.set_initial_training_values(self.args, self.get_train_dataloader())[-1])

    # ---- the loss

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        step, self._steps_unlogged = self.state.global_step, self._steps_unlogged + 1
        whole = self.step_loss.drawn(batches, step)
        rows = self.step_loss.count(whole, step)
        self._shares = {id(one["teacher"]): (whole[i], i, rows) for i, one in enumerate(batches)}
        return batches, None

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """A training batch is moved by the loss."""
        return inputs if self.model.training and "teacher" in inputs else super()._prepare_inputs(inputs)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The batch's share of the step's loss; in evaluation the model's own loss on the labels."""
        if return_outputs or not self.model.training:
            plain = {name: value for name, value in inputs.items() if name != "teacher"}
            return super().compute_loss(model, plain, return_outputs, num_items_in_batch)
        whole, number, rows = self._shares.pop(id(inputs["teacher"]))
        with torch.autocast(
            self.args.device.type, enabled=False
        ):  # StepLoss has one of its own, around the student alone
            loss, terms = self.step_loss.share(whole, number, rows, self.state.global_step)
        self._terms.update(terms)
        return loss

    def log(self, logs: dict[str, float], *arguments: Any, **keywords: Any) -> None:
        """``loss`` of training comes with its terms, as ``train-student`` names them: ``loss/reg``, …"""
        if "loss" in logs and self._loss:
            names = sorted(self._loss.terms)
            sums = torch.tensor([self._terms[name] for name in names], device=self.args.device)
            sums = self.accelerator.reduce(sums, "sum")
            logs |= {f"loss/{name}": one / self._steps_unlogged for name, one in zip(names, sums.tolist())}
            self._steps_unlogged, self._terms = 0, Counter()
        super().log(logs, *arguments, **keywords)

    # ---- what trains: the student and the method's maps

    def _wrap_model(self, model: Any, training: bool = True, dataloader: Any = None) -> Any:
        """The student with its maps, DistributedDataParallel around both: accelerate wraps nothing."""
        return self.step_loss.network if training else model

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if new and (maps := list(self.step_loss.module.maps.parameters())):
            optimizer.add_param_group({"params": maps, "weight_decay": self.args.weight_decay})
        return optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self._loss and len(self._loss.module.maps) and self.args.should_save:
            tensors = {
                name: one.detach().cpu().contiguous() for name, one in self._loss.module.maps.state_dict().items()
            }
            save_file(tensors, Path(output_dir or self.args.output_dir or ".") / MAPS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """By ``from_pretrained``: transformers saves multimodal models by the hub's names of their weights, and its trainer looks for
        the module's, finds none of them, and goes on with a warning."""
        into = self.model if model is None else model
        if hasattr(into, "peft_config"):  # adapters are found
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            saved = type(into).from_pretrained(resume_from_checkpoint, dtype=into.dtype, use_safetensors=True)
            into.load_state_dict(saved.state_dict())
        self._resumed = resume_from_checkpoint
        if self._loss:
            self._load_maps(resume_from_checkpoint)

    def _load_maps(self, checkpoint: str | None) -> None:
        if self._loss and checkpoint and (Path(checkpoint) / MAPS).is_file():
            self._loss.module.maps.load_state_dict(load_file(Path(checkpoint) / MAPS))


class _CollatedBatches(Dataset[NumberedRows]):
    """Number of a batch in the run → its rows."""

    def __init__(self, stream: CacheStream):
        self.stream = stream

    def __len__(self) -> int:
        """Rows: what transformers logs as examples."""
        return len(self.stream.rows)

    def __getitem__(self, number: int) -> NumberedRows:
        return self.stream.at(number)


class _Numbers:
    """Batch sampler: the numbers of an epoch's batches, which go on from epoch to epoch."""

    def __init__(self, batches: int):
        self.batches, self.epoch = batches, 0

    @property
    def batch_sampler(self) -> _Numbers:
        """Where transformers looks for ``set_epoch``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        for number in range(self.epoch * self.batches, (self.epoch + 1) * self.batches):
            yield [number]
