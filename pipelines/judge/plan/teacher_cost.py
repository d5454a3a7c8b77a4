"""What a teacher costs, from its configuration alone: operations of a forward, hours, files written once. No weight is read."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pipelines.judge.plan.field_sizes import RowCounts, calibration_files, record_bytes
from teacher_cache.errors import KdcliError
from teacher_cache.families import family_of
from teacher_cache.fields import Field
from teacher_cache.models.kind import auto_model, decoder_of, reads_images
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.records import Prepared
from teacher_cache.teachers.transformers import TeacherSpec, resolve_dtype
from teacher_cache.wants import Wants


@dataclass(frozen=True)
class Speed:
    """How fast a GPU is: measured tokens a second, or a peak and the share of it that is reached.

    Attributes:
        tokens_per_second: text and vision tokens, of one GPU; None: by operations.
        peak_tflops: of one GPU (989: H100 and H200, dense bfloat16).
    """

    tokens_per_second: float | None = None
    peak_tflops: float = 989.0
    utilisation: float = 0.4
    gpus: int = 8

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise KdcliError(f"--gpus must be at least 1, got {self.gpus}")
        if not 0 < self.utilisation <= 1:
            raise KdcliError(f"--utilisation must be in (0, 1], got {self.utilisation}")
        for name in ("tokens_per_second", "peak_tflops"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise KdcliError(f"--{name.replace('_', '-')} must be above 0, got {value}")

    def gpu_hours(self, tokens: float, flops: float) -> float:
        if self.tokens_per_second is not None:
            return tokens / self.tokens_per_second / 3600
        return flops / (self.peak_tflops * 1e12 * self.utilisation) / 3600

    @property
    def basis(self) -> str:
        if self.tokens_per_second is not None:
            return f"given: {self.tokens_per_second:,.0f} tokens/s a GPU"
        return (
            f"assumed: {self.utilisation:.0%} of {self.peak_tflops:g} TFLOP/s a GPU, 2 operations a parameter and token"
        )


@dataclass(frozen=True)
class ModelSize:
    """Parameters that take part in a product: of the language model without embeddings, of the vision tower, of the head."""

    language: int
    vision: int
    head: int

    def flops(self, tokens: int, patches: int, head_rows: int) -> int:
        """Of one sample's forward: 2 a parameter and token. Attention between tokens is left out (a few per cent at 1,000 tokens),
        and so is what a mixture of experts does not use.

        Args:
            tokens: text and vision tokens of the language model. patches: tokens of the vision tower. head_rows: rows the head reads.
        """
        return 2 * (self.language * tokens + self.vision * patches + self.head * head_rows)


def model_size(spec: TeacherSpec, config: Any, vocabulary: int) -> ModelSize:
    """Count parameters of the model built on the meta device; KdcliError where it cannot be built so."""
    try:
        with torch.device("meta"):
            model = auto_model(config).from_config(config, trust_remote_code=spec.trust_remote_code)
        language = family_of(config).language_model(decoder_of(model)) if reads_images(config) else decoder_of(model)
        embedding = model.get_input_embeddings().weight
    except Exception as error:  # of whatever its configuration makes transformers do
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise KdcliError(
            f"model {spec.id!r}: no operations can be counted ({reason}): give --tokens-per-second"
        ) from None
    inside = {id(one): one.numel() for one in language.parameters()}
    head = model.get_output_embeddings().weight
    vision = sum(one.numel() for one in model.parameters() if id(one) not in inside and one is not head)
    text = sum(count for known, count in inside.items() if known != id(embedding))
    return ModelSize(text, vision, vocabulary * embedding.shape[1])


def tower_tokens(prepared: Prepared, config: Any) -> int:
    """Patches that the vision tower reads for one sample (more than its vision tokens where patches are merged)."""
    pixels = prepared.pixels.get("pixel_values")
    if pixels is None:
        return 0
    patch = getattr(config.vision_config, "patch_size", None)
    if pixels.ndim == 2:  # families of the Qwen-VL kind hand over one row a patch
        return int(pixels.shape[0])
    side = patch if isinstance(patch, int) else patch[0] if patch else 0
    if pixels.ndim < 4 or not side:
        return len(prepared.vision_positions)
    views = pixels.shape[:-3].numel()
    return int(views * (pixels.shape[-2] // side) * (pixels.shape[-1] // side))


def head_rows(wants: Wants, counts: RowCounts) -> int:
    """Rows whose logits the capture computes."""
    return sum(getattr(counts, kind) for kind in wants.head_kinds)


def files_once(
    spec: TeacherSpec,
    processor: Any,
    config: Any,
    fields: Mapping[str, Field],
    width: int,
    vocabulary: int,
    like: TeacherCache | None,
) -> dict[str, int]:
    """Bytes of what a cache holds once for all shards, by what it is."""
    if not fields:
        return {}
    sizes = {"processor": processor_bytes(processor)}
    if any(name.endswith("_hidden") and not one.calibrated for name, one in fields.items()):
        dtype = resolve_dtype(replace(spec, device="cpu"), config)  # as the capture loads it
        sizes["head"] = record_bytes({"weight": torch.empty(vocabulary, width, dtype=dtype, device="meta")})
    for name, one in fields.items():
        if one.calibrated:
            for role, size in calibration_files(one, width, vocabulary, like).items():
                sizes[f"{name} {role.replace('_', ' ')}"] = size
    return sizes


def processor_bytes(processor: Any) -> int:
    with tempfile.TemporaryDirectory() as saved:
        processor.save_pretrained(saved)
        return sum(file.stat().st_size for file in Path(saved).iterdir())
