"""What lmms-eval asks → what a kdcli model answers: arguments, prompts, ways to generate. Needs no lmms-eval."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import PIL.Image
import torch

from pipelines.export.provenance import trained_template
from pipelines.judge.evaluation.answers import Prompt
from pipelines.judge.evaluation.run import pruning_of
from pipelines.settings import build
from student_train.pruning import Pruning
from teacher_cache.errors import CompatibilityError, KdcliError
from teacher_cache.preparing.prepare import PLACEHOLDER
from teacher_cache.preparing.templates import find_template
from teacher_cache.records import Image, Sample, Turn
from teacher_cache.sources import DataSpec
from teacher_cache.sources.usable_samples import stand_up, to_rgb

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_NEW_TOKENS = 1024
"""Where a task says nothing: what lmms-eval's own models take then."""


@dataclass(frozen=True)
class ModelArguments:
    """``--model_args`` of the plug-in, as ``kdcli eval`` has them as flags.

    Attributes:
        pretrained: model folder or hub id.
        compress: operator that removes vision tokens inside the language model, from layer ``compress_layer`` on, down to ``keep`` an
            image.
        vision_tokens: of an image, for a student whose compressor serves several counts; None: as trained.
        template: that the model was trained with; None: as its run says, else ``chat``.
        dtype: float32, bfloat16, float16; auto: bfloat16 on a GPU, else float32.
        device: None: the process's GPU where there is one.
    """

    pretrained: str
    compress: str | None = None
    keep: int | None = None
    compress_layer: int | None = None
    vision_tokens: int | None = None
    template: str | None = None
    batch_size: int = 1
    dtype: str = "auto"
    device: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", *DTYPES):
            raise KdcliError(f"dtype must be auto, {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.batch_size < 1:
            raise KdcliError(f"batch_size must be at least 1, got {self.batch_size}")
        _ = self.pruning
        if self.template is not None:
            find_template(self.template)

    @property
    def pruning(self) -> Pruning | None:
        return pruning_of(self.compress, self.keep, self.compress_layer)

    def asking_template(self) -> str:
        return self.template or trained_template(self.pretrained) or DataSpec.template

    def torch_dtype(self, device: str) -> torch.dtype:
        if self.dtype == "auto":
            return torch.bfloat16 if device.startswith("cuda") else torch.float32
        return DTYPES[self.dtype]


def model_arguments(given: Mapping[str, Any]) -> ModelArguments:
    """lmms-eval's keywords → ``ModelArguments``; KdcliError naming what it does not know. It hands a batch size on as text."""
    values = {name: value for name, value in given.items() if value is not None}
    batch_size = str(values.get("batch_size", 1))
    if not batch_size.isdecimal():
        raise KdcliError(f"batch_size must be a whole number for model kdcli, got {batch_size!r}")
    values["batch_size"] = int(batch_size)
    if "pretrained" in values:
        values["pretrained"] = str(values["pretrained"])  # a folder may be named 2025
    return build(ModelArguments, values, "--model_args")


@dataclass(frozen=True)
class Generation:
    """How one request wants its answer: greedily, so many tokens at most, ending before one of ``stop``."""

    max_new_tokens: int
    stop: tuple[str, ...]


def generation(given: Mapping[str, Any], task: str) -> Generation:
    """A task's ``generation_kwargs``; KdcliError where it samples or searches beams, which would be other answers than ours."""
    sampled = given.get("do_sample", float(given.get("temperature") or 0) > 0)
    if sampled or int(given.get("num_beams") or 1) > 1:
        raise KdcliError(
            f"task {task} samples or searches beams and model kdcli answers greedily: "
            "give --gen_kwargs do_sample=False,temperature=0,num_beams=1"
        )
    stop = given.get("until") or ()
    return Generation(
        int(given.get("max_new_tokens") or MAX_NEW_TOKENS),
        (stop,) if isinstance(stop, str) else tuple(one for one in stop if one),
    )


def prompt(context: str, visuals: Sequence[Any] | None, task: str) -> Prompt:
    """A request as one user turn.

    Where the text places its images (as many ``<image>`` as there are images), they stay there; else all stand in front of it, as in
    LLaVA's own evaluation, and left-over placeholders are taken out of the text.

    Raises:
        CompatibilityError: a visual is no picture (a video, a sound).
    """
    for one in visuals or ():
        if not isinstance(one, PIL.Image.Image):
            raise CompatibilityError(f"task {task} shows a {type(one).__name__}; model kdcli reads pictures only")
    images = [to_rgb(stand_up(one)) for one in visuals or ()]
    if context.count(PLACEHOLDER) != len(images):
        context = f"{PLACEHOLDER}\n" * len(images) + context.replace(PLACEHOLDER, "").lstrip()
    return Prompt((Turn("user", context),), images)


def row(asked: Prompt, continuation: str) -> Sample:
    """A prompt and what may follow it, as a row whose answer can be forced. Pixels stay the same: PNG loses nothing."""
    pictures = tuple(Image(f"image {number}", _png(one)) for number, one in enumerate(asked.images))
    turns = (*asked.turns, Turn("assistant", continuation.strip()))
    return Sample("lmms", 0, "", "a request of lmms-eval", turns, pictures)


def _png(image: PIL.Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png", compress_level=1)
    return buffer.getvalue()


UNLIKELY = "continuations cannot be rendered and count as infinitely unlikely"
UNASKED = "questions cannot be asked and count as empty answers"


def lost_note(lost: Sequence[tuple[str, str]], total: int, what: str) -> str:
    """What is said of requests that a model was not given; lost: (task, reason) of each. what: ``UNLIKELY`` or ``UNASKED``."""
    listed = ", ".join(f"{count} {reason} in {task}" for (task, reason), count in Counter(lost).most_common())
    return f"kdcli: {len(lost)} of {total} {what}: {listed}"
