"""A student opened, loaded, frozen by stage and saved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from student_train.compression import compressor_of, install, load_compressed, settle, with_grid
from student_train.compressors import CompressorSpec
from student_train.whole import check_model
from teacher_cache.errors import CompatibilityError
from teacher_cache.families import family_of
from teacher_cache.models.kind import auto_model, open_processor, reads_images
from teacher_cache.models.loading import attending, naming_what_fails
from teacher_cache.models.weights import check_weights, refuse_missing
from teacher_cache.preparing.token_rows import check_token_ids


def load_student(
    model_id: str,
    attn_implementation: str,
    trust_remote_code: bool = False,
    compressor: CompressorSpec | None = None,
) -> tuple[nn.Module, Any]:
    """(model in float32, processor); KdcliError where the folder or hub id is not to be had, or is a stage's model that is damaged.

    Args:
        attn_implementation: ``sdpa`` gives way to ``eager`` where the architecture has none (Gemma 2), as in transformers.
        compressor: of its vision tokens; None: as the folder is. One that the folder has not yet is installed, its fresh weights
            drawn from torch's generator.
    """
    processor, config, spec = open_student(model_id, trust_remote_code, compressor)
    # Other checkpoints than safetensors are pickles.
    arguments = {"dtype": torch.float32, "use_safetensors": True}
    what = f"student {model_id!r}"
    check_weights(what, model_id, config, trust_remote_code)
    with naming_what_fails(what):
        try:
            if compressor_of(config) and spec:
                return load_compressed(model_id, spec, attn_implementation, **arguments), processor
            loaded: Any = auto_model(config).from_pretrained(
                model_id,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                **arguments,
                **attending(config, attn_implementation),
            )
        except ValueError as error:
            if attn_implementation != "sdpa" or 'attn_implementation="eager"' not in str(error):
                raise
            return load_student(model_id, "eager", trust_remote_code, compressor)
        model, found = loaded
        refuse_missing(what, found)
    if spec:
        install(model, spec)
    return model, processor


def open_student(
    model_id: str, trust_remote_code: bool = False, compressor: CompressorSpec | None = None
) -> tuple[Any, Any, CompressorSpec | None]:
    """(processor, configuration, settled compressor) without any weights; the processor writes the compressed count."""
    what = f"student {model_id!r}"
    check_model(Path(model_id))  # of a run: a damaged file is named as such, not by what it became
    processor, config = open_processor(what, model_id, trust_remote_code=trust_remote_code)
    with naming_what_fails(what):
        check_token_ids(processor.tokenizer, config)
        spec = settle(compressor, config, processor, model_id)
    return with_grid(processor, spec), config, spec


def module_group(parameter: str, config: Any = None) -> str:
    """``projector``, ``language_model`` or ``vision_tower`` of a parameter's path. config: of the model, whose family names its modules;
    one that reads text alone is all language model."""
    if config is not None and not reads_images(config):
        return "language_model"
    path = parameter.split(".")
    groups = family_of(config).modules
    for group, names in groups.items():
        if any(name in path for name in names):
            return group
    raise CompatibilityError(f"parameter {parameter} belongs to no known module group ({', '.join(groups)})")


def freeze_except(model: nn.Module, groups: Sequence[str]) -> list[tuple[str, nn.Parameter]]:
    """Train the given groups, freeze the rest. Returns the trainable parameters by name."""
    trainable = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(module_group(name, model.config) in groups)
        if parameter.requires_grad:
            trainable.append((name, parameter))
    if not trainable:
        raise CompatibilityError(f"the student has no parameters in {', '.join(groups)}")
    return trainable


def save_student(
    model: nn.Module, processor: Any, folder: Path, weights: Mapping[str, torch.Tensor] | None = None
) -> None:
    """A plain Hugging Face folder: safetensors, config, processor, tokenizer and chat template.

    Args:
        weights: of a model that has only shards of them itself.
    """
    model.save_pretrained(folder, state_dict=weights)  # type: ignore[operator]
    processor.save_pretrained(folder)
    share(folder.glob("*.safetensors"))


def share(files: Iterable[Path]) -> None:
    """Give files that safetensors wrote, for their owner alone, the permissions that the umask gives any new file there."""
    for file in files:
        fresh = file.with_name(f".{file.name}.mode")
        fresh.touch()
        file.chmod(fresh.stat().st_mode)
        fresh.unlink()
