"""What a training run can be told; names follow ``transformers.TrainingArguments`` where it has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from teacher_cache.errors import KdcliError

TRACKERS = ("tensorboard", "wandb", "trackio")


@dataclass(frozen=True)
class TrainSettings:
    """``[train]``: defaults of every stage.

    Attributes:
        student: model folder or hub id that the first stage starts from.
        output_dir: one folder a stage below it.
        per_device_train_batch_size × gradient_accumulation_steps × processes = samples of one optimizer step.
        max_steps: optimizer steps of the stage; 0: ``num_train_epochs`` epochs.
        learning_rate: 0: the stage's own (PT, DPT 1e-3; SFT, DFT 2e-5).
        compressor: of vision tokens (student_train/compressors), ``none``: as the student is; None: the method's own choice, if it has one.
        vision_tokens: that it leaves of an image; None: a quarter. vision_feature_layers: layers of the vision tower that it reads,
            for one that chooses them.
        vision_tower_learning_rate: of the vision tower in the stages that train the language model; 0: it stays frozen.
        bf16: mixed precision; weights and optimizer state stay float32.
        fsdp: under torchrun, shard weights, gradients and optimizer state over the processes (FSDP2); else each has all (DDP).
        save_steps: steps between checkpoints. save_total_limit: how many are kept.
        report_to: trackers, a list or comma-separated: tensorboard, wandb, trackio; or none (metrics.jsonl is always written).
        trust_remote_code: run the program code that the student's folder or repository brings; read it first.
        local_cache: folder on a local disk where tars of an object store are kept, shared by all processes of a machine.
        local_cache_gb: most GB (1e9 bytes) that it takes.
        use_liger_kernel: Liger-Kernel's fused cross-entropy where a stage has no other loss on response tokens (CUDA, extra ``liger``).
    """

    student: str | None = None
    output_dir: str = "runs"
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    num_train_epochs: float = 1.0
    max_steps: int = 0
    learning_rate: float = 0.0
    vision_tower_learning_rate: float = 0.0
    weight_decay: float = 0.0
    warmup_ratio: float = 0.03
    max_grad_norm: float = 1.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    max_length: int = 2048
    seed: int = 0
    bf16: bool = False
    fsdp: bool = False
    gradient_checkpointing: bool = False
    dataloader_num_workers: int = 0
    logging_steps: int = 1
    save_steps: int = 500
    save_total_limit: int = 2
    report_to: str | tuple[str, ...] = "tensorboard"
    attn_implementation: str = "sdpa"
    compressor: str | None = None
    vision_tokens: int | None = None
    vision_feature_layers: tuple[int, ...] = ()
    use_liger_kernel: bool = False
    trust_remote_code: bool = False
    local_cache: str | None = None
    local_cache_gb: float = 100.0

    def __post_init__(self) -> None:
        positive = (
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "logging_steps",
            "save_steps",
            "max_length",
        )
        for name in positive:
            if getattr(self, name) < 1:
                raise KdcliError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.local_cache_gb > 0:
            raise KdcliError(f"local_cache_gb must be above 0, got {self.local_cache_gb}")
        self.trackers()

    def trackers(self) -> tuple[str, ...]:
        """The trackers of ``report_to`` by name, each once; KdcliError listing the choices."""
        given = self.report_to.split(",") if isinstance(self.report_to, str) else self.report_to
        names = tuple(dict.fromkeys(name.strip() for name in given if name.strip()))
        unknown = [name for name in names if name not in (*TRACKERS, "none")]
        if unknown or ("none" in names and len(names) > 1):
            wrong = f"got {', '.join(unknown)}" if unknown else "and none stands alone"
            raise KdcliError(f"report_to is a list of {', '.join(TRACKERS)}, or none; {wrong}")
        return tuple(name for name in names if name != "none")


@dataclass(frozen=True)
class StageSettings:
    """``[stages.DPT]`` and the like: what differs from ``[train]`` in one stage; None: as there.

    Attributes:
        parts: mixture parts it reads.
        knobs: of the method, in this stage only.
    """

    parts: tuple[str, ...] | None = None
    knobs: Mapping[str, Any] | None = None
    per_device_train_batch_size: int | None = None
    gradient_accumulation_steps: int | None = None
    num_train_epochs: float | None = None
    max_steps: int | None = None
    learning_rate: float | None = None
    vision_tower_learning_rate: float | None = None
    weight_decay: float | None = None
    warmup_ratio: float | None = None

    def over(self, train: TrainSettings) -> TrainSettings:
        """The stage's settings: its own values over the run's."""
        own = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in ("parts", "knobs")}
        return replace(train, **{name: value for name, value in own.items() if value is not None})
