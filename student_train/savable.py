"""Whether a student can be saved, looked at before its first step: found out behind the last, it costs the stage.

What transformers refuses is its own to say, so it is asked: everything is saved once to a folder that goes again, weights as one number a
tensor.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from student_train.whole import make_folder
from teacher_cache.errors import CompatibilityError, KdcliError


def refuse_quantized(config: Any, student: str) -> None:
    """CompatibilityError where transformers would load quantized weights, which are neither trained nor saved; no weights are read."""
    from transformers.quantizers import AutoHfQuantizer

    for one in (config, config.get_text_config()):
        said = getattr(one, "quantization_config", None)
        body = said if isinstance(said, dict) else getattr(said, "to_dict", dict)()
        try:
            quantized = bool(body) and AutoHfQuantizer.supports_quant_method(body)
        except ValueError:  # it names no method
            quantized = True
        if quantized:
            raise CompatibilityError(
                f"{student}: config.json says that its weights are quantized (quantization_config: {body.get('quant_method')}): train the "
                "unquantized model, or remove quantization_config where the weights are whole"
            )


def check_savable(model: Any, processor: Any, folder: Path, student: str) -> None:
    """KdcliError where ``save_student`` would not get through in ``folder/model``, with the part that is to be mended.

    Args:
        student: names it in the line.
    """
    make_folder(folder)
    place = folder / "model"
    if place.is_symlink() or (place.exists() and not place.is_dir()):
        raise KdcliError(
            f"{place} is a {'link' if place.is_symlink() else 'file'}, and the student goes there: move it away"
        )
    size = sum(one.numel() * one.element_size() for one in model.parameters())
    if (free := shutil.disk_usage(folder).free) < size:
        raise KdcliError(
            f"{folder}: {free / 1e9:.1f} GB are free, the student takes {size / 1e9:.1f} GB: make room, or choose another --output-dir"
        )
    with tempfile.TemporaryDirectory(prefix=".savable-", dir=folder) as probe:
        with _named(student, "config.json"):
            model.config.save_pretrained(probe)
        with _named(student, "generation_config.json"):
            if model.can_generate():
                model.generation_config.save_pretrained(probe)
        with _named(student, "the processor"):
            processor.save_pretrained(probe)
        with _named(student, "the model"):
            model.save_pretrained(probe, state_dict=_numbers(model), save_original_format=False)


@contextmanager
def _named(student: str, what: str) -> Iterator[None]:
    try:
        yield
    except OSError:  # of the disk, which names the place itself
        raise
    except Exception as error:  # of whatever transformers and safetensors refuse
        reason = " ".join(str(error).split())[:400] or type(error).__name__
        raise KdcliError(f"{student}: {what} cannot be saved after the stage ({reason}): fix it first") from None


def _numbers(model: Any) -> dict[str, torch.Tensor]:
    """A number in place of each tensor of the state; names of one and the same tensor share their number, as transformers minds."""
    numbers: dict[tuple[Any, ...], torch.Tensor] = {}
    return {
        name: numbers.setdefault((one.device, one.data_ptr(), one.numel()) if one.numel() else (name,), torch.zeros(1))
        for name, one in model.state_dict().items()
    }
