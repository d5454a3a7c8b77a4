"""What a training run can be told; names follow ``transformers.TrainingArguments`` where it has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from teacher_cache.errors import KdcliError
from teacher_cache.shards.places import local_path

TRACKERS = ("tensorboard", "wandb", "trackio")


@dataclass(frozen=True)
class TrainSettings:
    """``[train]``: defaults of every stage.

    Attributes:
        student: model folder or hub id that the first stage starts from.
        output_dir: output folder of the run, with one folder per stage.
        per_device_train_batch_size: samples per micro-batch and process.
        gradient_accumulation_steps: micro-batches per optimizer step.
        num_train_epochs: epochs per stage.
        max_steps: optimizer steps per stage; 0: as many as the epochs take.
        learning_rate: peak learning rate; 0: the stage's own (PT, DPT 1e-3; SFT, DFT 2e-5).
        vision_tower_learning_rate: learning rate of the vision tower in stages that train the language model; 0: frozen.
        weight_decay: weight decay of AdamW.
        warmup_ratio: warm-up share of the steps.
        max_grad_norm: norm at which gradients are clipped; 0: never.
        adam_beta1: beta1 of AdamW.
        adam_beta2: beta2 of AdamW.
        max_length: maximum length of a row in tokens, as in the capture.
        seed: seed of the sample order and of every random number.
        bf16: mixed precision; weights and optimizer state stay float32.
        fsdp: under torchrun, shard weights, gradients and optimizer state over the processes (FSDP2); else each has all of them (DDP).
        packing: several samples in one row, for less padding (docs/train.md); default: where that is possible.
        gradient_checkpointing: recompute activations: less memory, more time.
        dataloader_num_workers: loader processes; 0: load in the main process.
        logging_steps: steps between lines of ``metrics.jsonl``.
        log_term_gradients: steps between measurements of each loss term's gradient, its norm and its cosines; 0: never.
        schedule: schedules of loss terms' weights, as ``{ vis = "linear:1:0" }``: ``constant:F``, ``linear:A:B``, ``warm-hold-decay:W:D``.
        select: weights of rows in a loss term, as ``{ reg = "unless-contradicted:0.9" }`` (``agreement``, ``confidence``, ``column:NAME``).
        save_steps: steps between checkpoints.
        save_total_limit: checkpoints to keep; 0: all. Keep two: a run falls back to the previous one if the newest is damaged.
        report_to: trackers, a list or comma-separated: ``tensorboard``, ``wandb``, ``trackio``, or ``none`` beside ``metrics.jsonl``.
        attn_implementation: attention of the student: ``sdpa``, ``eager``, ``flash_attention_2``.
        compressor: compressor of vision tokens; ``none``: the unchanged student; default: the method's own, if it has one.
        vision_tokens: vision tokens per image after the compressor; default: a quarter.
        vision_feature_layers: layers of the vision tower that the compressor reads, if it supports a choice.
        use_liger_kernel: use Liger-Kernel's fused cross-entropy in stages without another loss on response tokens (CUDA, extra ``liger``).
        trust_remote_code: run the program code that the student's folder or repository brings; read it first.
        local_cache: folder on a local disk that keeps tars read from an object store, shared by all processes of a machine.
        local_cache_gb: maximum size of ``local_cache`` in GB (1e9 bytes).
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
    packing: bool | None = None
    gradient_checkpointing: bool = False
    dataloader_num_workers: int = 0
    logging_steps: int = 1
    log_term_gradients: int = 0
    schedule: Mapping[str, str] | None = None
    select: Mapping[str, str] | None = None
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
        for name in ("save_total_limit", "log_term_gradients"):
            if getattr(self, name) < 0:
                raise KdcliError(f"{name} must be at least 0, got {getattr(self, name)}")
        check_texts(self.schedule, self.select)
        if not self.local_cache_gb > 0:
            raise KdcliError(f"local_cache_gb must be above 0, got {self.local_cache_gb}")
        local_path(self.output_dir, "--output-dir")
        if self.local_cache is not None:
            local_path(self.local_cache, "--local-cache")
        self.trackers()

    def trackers(self) -> tuple[str, ...]:
        """The trackers of ``report_to`` by name, each once; KdcliError listing the choices."""
        given = self.report_to.split(",") if isinstance(self.report_to, str) else self.report_to
        names = tuple(dict.fromkeys(name.strip() for name in given if name.strip()))
        unknown = [name for name in names if name not in (*TRACKERS, "none")]
        if unknown or ("none" in names and len(names) > 1):
            wrong = f"got {', '.join(unknown)}" if unknown else "and none must be the only one"
            raise KdcliError(f"report_to is a list of {', '.join(TRACKERS)}, or none; {wrong}")
        return tuple(name for name in names if name != "none")


@dataclass(frozen=True)
class StageSettings:
    """``[stages.DPT]`` and the like: what differs from ``[train]`` in one stage; None: as there.

    Attributes:
        parts: mixture parts that the stage reads; default: PT and DPT read ``caption``, SFT and DFT ``sft``.
        knobs: knobs of the method in this stage only, as ``{ gamma = 0.5 }``.
        schedule: replaces that of ``[train]`` in this stage.
        select: replaces that of ``[train]`` in this stage.
        per_device_train_batch_size: as in ``[train]``.
        gradient_accumulation_steps: as in ``[train]``.
        num_train_epochs: as in ``[train]``.
        max_steps: as in ``[train]``.
        learning_rate: as in ``[train]``.
        vision_tower_learning_rate: as in ``[train]``.
        weight_decay: as in ``[train]``.
        warmup_ratio: as in ``[train]``.
    """

    parts: tuple[str, ...] | None = None
    knobs: Mapping[str, Any] | None = None
    schedule: Mapping[str, str] | None = None
    select: Mapping[str, str] | None = None
    per_device_train_batch_size: int | None = None
    gradient_accumulation_steps: int | None = None
    num_train_epochs: float | None = None
    max_steps: int | None = None
    learning_rate: float | None = None
    vision_tower_learning_rate: float | None = None
    weight_decay: float | None = None
    warmup_ratio: float | None = None

    def __post_init__(self) -> None:
        check_texts(self.schedule, self.select)

    def over(self, train: TrainSettings) -> TrainSettings:
        """The stage's settings: its own values over the run's."""
        own = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in ("parts", "knobs")}
        return replace(train, **{name: value for name, value in own.items() if value is not None})


def check_texts(schedule: Mapping[str, Any] | None, select: Mapping[str, Any] | None) -> None:
    """KdcliError where a term is told something that is no text."""
    for key, told in (("schedule", schedule), ("select", select)):
        for term, text in (told or {}).items():
            if not isinstance(text, str):
                raise KdcliError(f"{key} of {term} must be text, got {text!r}")
