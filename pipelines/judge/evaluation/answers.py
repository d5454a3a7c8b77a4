"""How a model answers: greedy text after a prompt, and how likely it finds an expected answer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from student_train.losses.divergences import cross_entropy
from student_train.pruning import Pruning
from student_train.student import RowForward
from teacher_cache.errors import SkipSample, refusing_row
from teacher_cache.families import family_of
from teacher_cache.models.head import CHUNK_BYTES, chunk_rows, head_logits
from teacher_cache.preparing.batch import collate
from teacher_cache.preparing.chat import chat_of
from teacher_cache.preparing.pixels import check_resized
from teacher_cache.preparing.prepare import Preparer
from teacher_cache.preparing.templates import find_template, write_prompt
from teacher_cache.records import Prepared, Sample, Turn
from teacher_cache.sources import DataSpec
from teacher_cache.sources.usable_samples import PLACEHOLDER, decode_image

MAX_NEW_TOKENS = 32


@dataclass(frozen=True)
class Compression:
    """Vision tokens removed while a model answers. generator: of random choices, one for the whole file whatever the batch size."""

    pruning: Pruning
    generator: torch.Generator

    def around(self, model: Any, images: Sequence[int]) -> AbstractContextManager[Any]:
        """images: of each question."""
        from student_train.pruning.forward import prune_vision

        return prune_vision(model, self.pruning, images=images, generator=self.generator)


@dataclass(frozen=True)
class Prompt:
    """What a model is asked: turns of which the last is the user's, and as many RGB images as they have placeholders."""

    turns: Sequence[Turn]
    images: Sequence[Any] = ()


def prompt_of(row: Sample, max_image_pixels: int = DataSpec.max_image_pixels) -> Prompt:
    """A row's last user turn and the turns before it, without the answer."""
    asked = row.turns[:-1]
    kept = sum(turn.text.count(PLACEHOLDER) for turn in asked)
    return Prompt(asked, [decode_image(image, max_image_pixels) for image in row.images[:kept]])


def check_asking(processor: Any, template: str) -> None:
    """CompatibilityError where a model with this processor cannot be asked by this template at all."""
    if find_template(template).prompt is None:
        chat_of(processor).check()


@torch.inference_mode()
def answer(
    model: Any,
    processor: Any,
    prompts: Sequence[Prompt],
    max_new_tokens: int = MAX_NEW_TOKENS,
    compression: Compression | None = None,
    stop: Sequence[str] = (),
    template: str = "chat",
) -> list[str]:
    """Greedy answers, one batch padded on the left.

    Args:
        template: that asks; a caption template asks as ``chat`` does.
        stop: an answer ends before the first of these texts that stands in it.

    Raises:
        SkipSample: the chat template or the processor does not take one of the prompts.
    """
    tokenizer = processor.tokenizer
    written = [write_prompt(template, chat_of(processor), prompt.turns) for prompt in prompts]
    begins = {one for _, one in written}
    if len(begins) > 1:  # a processor adds the first token to all texts of a batch or to none
        how = (max_new_tokens, compression, stop, template)
        return [said for prompt in prompts for said in answer(model, processor, [prompt], *how)]
    # A list a prompt: some processors see several images of a row otherwise than one.
    if processor.image_processor is None and any(prompt.images for prompt in prompts):
        raise SkipSample("images_unread", "the question has images, and the model is text-only")
    family = family_of(model.config)
    images = [list(prompt.images) for prompt in prompts if prompt.images or family.lists_every_text(processor)]
    arguments: dict[str, Any] = {"images": images, **family.image_arguments(processor)} if any(images) else {}
    arguments |= {"padding": True, "padding_side": "left", "add_special_tokens": begins.pop()}
    check_resized(processor.image_processor, [one for each in images for one in each], DataSpec.max_image_pixels)
    with refusing_row("the processor refuses the question"):
        inputs = processor(text=[text for text, _ in written], **arguments, return_tensors="pt")
    inputs = inputs.to(model.device)
    _narrow(inputs, model.dtype)
    length = inputs["input_ids"].shape[1]
    counts = [len(prompt.images) for prompt in prompts]
    with compression.around(model, counts) if compression else nullcontext():
        generated = model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id or 0,
            stopping_criteria=[_Stop(tokenizer, length, stop)] if stop else None,
        )
    said = tokenizer.batch_decode(generated[:, length:], skip_special_tokens=True)
    return [until(text, stop) for text in said]


def answers_or_skips(
    model: Any, processor: Any, prompts: Sequence[Prompt], *asked: Any, **how: Any
) -> list[str | SkipSample]:
    """``answer``, and of each prompt that cannot be asked the reason: one of a batch costs the others nothing."""
    try:
        return list(answer(model, processor, prompts, *asked, **how))
    except SkipSample as skip:
        if len(prompts) == 1:
            return [skip]
    return [one for prompt in prompts for one in answers_or_skips(model, processor, [prompt], *asked, **how)]


def _narrow(inputs: Any, dtype: torch.dtype) -> None:
    """Pixels come as float32 from the processor; the model may be narrower."""
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)


def until(text: str, stop: Sequence[str]) -> str:
    """``text`` before the first stop text in it."""
    return text[: min((at for one in stop if (at := text.find(one)) >= 0), default=len(text))]


class _Stop:
    """A sequence is done once a stop text stands among its newest tokens. Looking at the whole answer in every step would be quadratic."""

    def __init__(self, tokenizer: Any, length: int, stop: Sequence[str]):
        self.tokenizer, self.length, self.stop = tokenizer, length, stop
        # A token has one byte at least; a few more, since the first of them may begin in the middle of a character.
        self.newest = max(len(one.encode()) for one in stop) + 4

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        tails = input_ids[:, self.length :][:, -self.newest :]
        said = self.tokenizer.batch_decode(tails, skip_special_tokens=True)
        done = [any(one in text for one in self.stop) for text in said]
        return torch.tensor(done, device=input_ids.device)


@dataclass(frozen=True)
class Forced:
    """How a row's expected last answer fares, teacher-forced on the row as training renders it, the end of turn included.

    Attributes:
        nats: float64 ``[tokens]`` on the CPU, of each token of the answer; no tokens where ``skip``.
        sure: float64 ``[tokens]``, probability of the likeliest token. right: bool ``[tokens]``: that one is the answer's.
        skip: why training could not render the row; None: it could.
    """

    nats: torch.Tensor
    sure: torch.Tensor
    right: torch.Tensor
    skip: SkipSample | None = None

    @property
    def greedy(self) -> bool:
        """Every token is the likeliest one."""
        return self.skip is None and bool(self.right.all())


@torch.inference_mode()
def expected(
    student: RowForward,
    preparer: Preparer,
    questions: Sequence[Sample],
    spec: DataSpec,
    compression: Compression | None = None,
) -> list[Forced]:
    """One ``Forced`` a row."""
    prepared: list[Prepared | SkipSample] = []
    for row in questions:
        try:
            prepared.append(preparer.prepare(row, spec.template, spec.max_image_pixels))
        except SkipSample as skip:
            prepared.append(skip)
    usable = [one for one in prepared if isinstance(one, Prepared)]
    told = _forced(student, preparer, usable, compression) if usable else []
    own = iter(told)
    nothing = torch.zeros(0, dtype=torch.float64)
    return [
        Forced(nothing, nothing, nothing.bool(), one) if isinstance(one, SkipSample) else next(own) for one in prepared
    ]


def _forced(
    student: RowForward, preparer: Preparer, usable: Sequence[Prepared], compression: Compression | None
) -> list[Forced]:
    """Of rows that training can render."""
    batch = collate(usable, preparer.tokenizer.pad_token_id or 0).to(student.weight.device)
    _narrow(batch.inputs, student.weight.dtype)
    if compression:
        # As when it answers: the last prompt token ranks, and every image keeps as many tokens.
        asking = torch.stack([one.response_rows[_last_turn(one)][0] for one in usable])
        images = [len(one.layout) for one in usable]
        how = {"query_at": asking, "images": images, "generator": compression.generator}
        hidden = student(batch, ["response"], compression.pruning, how)["response"]
    else:
        hidden = student(batch, ["response"])["response"]
    head = student.head
    rows = chunk_rows(head, CHUNK_BYTES)
    nats, sure, right = list[torch.Tensor](), list[torch.Tensor](), list[torch.Tensor]()
    for states, labels in zip(hidden.split(rows), batch.labels.split(rows)):
        logits = head_logits(states, head, student.form.cap)
        nats.append(cross_entropy(logits, labels).double())
        top = logits.max(dim=-1)
        sure.append((top.values.double() - logits.logsumexp(dim=-1).double()).exp())
        right.append(top.indices == labels)
    counts = list(batch.counts["response"])
    each = (torch.cat(one).cpu().split(counts) for one in (nats, sure, right))
    last = map(_last_turn, usable)
    return [Forced(one[own], top[own], hit[own]) for one, top, hit, own in zip(*each, last)]


def _last_turn(prepared: Prepared) -> torch.Tensor:
    """bool ``[response rows]``: those of the last answer; earlier answers are context."""
    turns = prepared.text.turn[prepared.text.response]
    return turns == turns[-1]
