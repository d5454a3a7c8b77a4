"""``kdcli eval``: greedy answers to the questions of a held-out file, exact match by family; and how likely the expected answers are.

``nll`` is the mean negative log-likelihood of the expected answer's tokens in nats, teacher-forced on the row as training renders it, the
end-of-turn token included: over the tokens of a family, then the mean of families. It moves with every step, where exact match waits
for an answer to flip.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch

from student_train.compressors import CompressorSpec
from student_train.losses.divergences import cross_entropy
from student_train.pruning import Pruning, operator_modules
from student_train.student import RowForward, load_student, open_student
from teacher_cache.batch import collate
from teacher_cache.cache_shard import skip_record
from teacher_cache.errors import DataError, KdcliError, SkipRow
from teacher_cache.prepare import Limits, Preparer
from teacher_cache.records import Prepared, Sample, SkipRecord
from teacher_cache.rows import PLACEHOLDER, check_sample, decode_image
from teacher_cache.sources import DataSpec, open_source
from teacher_cache.teachers.head import CHUNK_BYTES, chunk_rows, head_logits
from teacher_cache.templates import find_template, write_prompts

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
class Answer:
    """One scored question.

    Attributes:
        family: the row's ``family`` column, or its part.
        nats: negative log-likelihood of all ``tokens`` of the expected answer; 0 tokens where training could not render the row.
    """

    family: str
    question: str
    expected: str
    given: str
    nats: float = 0.0
    tokens: int = 0

    @property
    def correct(self) -> bool:
        return normalise(self.given) == normalise(self.expected)


def normalise(text: str) -> str:
    """Case, outer white space and a final full stop do not count."""
    return text.strip().rstrip(".").strip().lower()


def read_questions(spec: DataSpec) -> Iterator[Sample | SkipRecord]:
    """Usable rows of a held-out file; the others as skip records."""
    source = open_source(spec)
    for group in source.scan(500):
        for row in source.read(group):
            if isinstance(row, SkipRecord):
                yield row
                continue
            try:
                check_sample(row, spec.max_image_pixels)
            except SkipRow as skip:
                yield skip_record(row, skip)
            else:
                yield row


@torch.inference_mode()
def answer(
    model: Any,
    processor: Any,
    questions: Sequence[Sample],
    max_new_tokens: int = MAX_NEW_TOKENS,
    max_image_pixels: int = DataSpec.max_image_pixels,
    compression: Compression | None = None,
    template: str = "chat",
) -> list[str]:
    """Greedy answers to each row's last user turn, given the turns before it, asked as ``template`` asks."""
    tokenizer = processor.tokenizer
    owner = processor if processor.chat_template else tokenizer
    asked = [row.turns[:-1] for row in questions]
    texts, begins = write_prompts(template, owner, asked)
    images: list[Any] = []
    counts: list[int] = []
    for row, turns in zip(questions, asked):
        kept = sum(turn.text.count(PLACEHOLDER) for turn in turns)
        if kept:  # a list a row: some processors see several images of a row otherwise than one
            images.append([decode_image(image, max_image_pixels) for image in row.images[:kept]])
        counts.append(kept)
    arguments: dict[str, Any] = {"images": images} if images else {}
    arguments |= {"padding": True, "padding_side": "left", "add_special_tokens": begins}
    inputs = processor(text=texts, **arguments, return_tensors="pt").to(model.device)
    with compression.around(model, counts) if compression else nullcontext():
        generated = model.generate(
            **inputs, do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id or 0
        )
    return tokenizer.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@torch.inference_mode()
def answer_nats(
    student: RowForward,
    preparer: Preparer,
    questions: Sequence[Sample],
    spec: DataSpec,
    compression: Compression | None = None,
) -> list[tuple[float, int]]:
    """(nats, tokens) of each row's expected last answer; (0, 0) for a row that training could not render either."""
    prepared: list[Prepared | None] = []
    for row in questions:
        try:
            prepared.append(preparer.prepare(row, spec.template, spec.max_image_pixels))
        except SkipRow:
            prepared.append(None)
    usable = [one for one in prepared if one is not None]
    if not usable:
        return [(0.0, 0)] * len(questions)
    batch = collate(usable, preparer.tokenizer.pad_token_id or 0).to(student.head.device)
    if compression:
        # As when it answers: the last prompt token ranks, and every image keeps as many tokens.
        asking = torch.stack([one.response_rows[_last_turn(one)][0] for one in usable])
        images = [len(one.layout) for one in usable]
        how = {"query_at": asking, "images": images, "generator": compression.generator}
        hidden = student(batch, ["response"], compression.pruning, how)["response"]
    else:
        hidden = student(batch, ["response"])["response"]
    rows = chunk_rows(student.head, CHUNK_BYTES)
    values = [
        cross_entropy(head_logits(states, student.head), labels)
        for states, labels in zip(hidden.split(rows), batch.labels.split(rows))
    ]
    each = torch.cat(values).double().cpu().split(list(batch.counts["response"]))
    own = iter([nats[_last_turn(one)] for one, nats in zip(usable, each)])
    return [(0.0, 0) if one is None else (float((nats := next(own)).sum()), len(nats)) for one in prepared]


def _last_turn(prepared: Prepared) -> torch.Tensor:
    """bool ``[response rows]``: those of the last answer; earlier answers are context."""
    turns = prepared.text.turn[prepared.text.response]
    return turns == turns[-1]


def evaluate(
    model: Any,
    processor: Any,
    spec: DataSpec,
    batch_size: int = 32,
    advance: Callable[[int], None] = lambda rows: None,
    pruning: Pruning | None = None,
) -> dict[str, Any]:
    """``score`` of the answers, and ``"skipped": {reason: rows}``, ``"answers": [Answer]``.

    With ``pruning``, vision tokens are removed inside the language model while it answers, and ``"compression"`` says how.
    """
    model.eval()
    student, preparer = RowForward(model), Preparer(processor, model.config, Limits(max_length=1 << 60))
    # A generator each: what is kept must not depend on what else is measured.
    compression, forced = (
        Compression(pruning, torch.Generator().manual_seed(0)) if pruning else None for _ in range(2)
    )
    rows = list(read_questions(spec))
    questions: list[Sample] = []
    skipped: dict[str, int] = defaultdict(int)
    for row in rows:
        if isinstance(row, SkipRecord):
            skipped[row.reason] += 1
        elif row.turns[-1].role != "assistant":
            skipped["no_answer"] += 1  # its last question has nothing to be held against
        else:
            questions.append(row)
    if not questions:
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items()) or "it is empty"
        raise DataError(f"{spec.path}: no row can be scored ({reasons})")
    answers: list[Answer] = []
    for start in range(0, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        said = answer(
            model,
            processor,
            batch,
            max_image_pixels=spec.max_image_pixels,
            compression=compression,
            template=spec.template,
        )
        for row, given, (nats, tokens) in zip(batch, said, answer_nats(student, preparer, batch, spec, forced)):
            family = str(row.extra.get("family", row.part))
            answers.append(Answer(family, row.turns[-2].text, row.turns[-1].text, given, nats, tokens))
        advance(len(batch))
    how = {"compression": asdict(pruning)} if pruning else {}
    return {**score(answers), **how, "skipped": dict(skipped), "answers": answers}


def score(answers: Sequence[Answer]) -> dict[str, Any]:
    """Exact match over all rows, over families (each counts the same), and by family; ``nll`` in the same three ways.

    Returns:
        ``{"n", "exact_match", "family_mean", "nll", "nll_family_mean", "families": {name: {"n", "exact_match", "tokens", "nll"}}}``;
        ``nll`` is None where no answer token was scored.
    """
    by_family: dict[str, list[Answer]] = defaultdict(list)
    for one in answers:
        by_family[one.family].append(one)
    families = {name: _tally(members) for name, members in sorted(by_family.items())}
    every = _tally(answers)
    return {
        "n": every["n"],
        "exact_match": every["exact_match"],
        "family_mean": _mean([one["exact_match"] for one in families.values()]) or 0.0,
        "nll": every["nll"],
        "nll_family_mean": _mean([one["nll"] for one in families.values() if one["nll"] is not None]),
        "families": families,
    }


def _tally(answers: Sequence[Answer]) -> dict[str, Any]:
    tokens = sum(one.tokens for one in answers)
    return {
        "n": len(answers),
        "exact_match": sum(one.correct for one in answers) / max(1, len(answers)),
        "tokens": tokens,
        "nll": sum(one.nats for one in answers) / tokens if tokens else None,
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def pruning_of(compress: str | None, keep: int | None, layer: int | None) -> Pruning | None:
    """What the flags of an evaluation ask for; None: all vision tokens stay. KdcliError before anything is loaded."""
    if compress is None:
        if keep is not None or layer is not None:
            choices = ", ".join(sorted(operator_modules()))
            raise KdcliError(f"keep and compress-layer need compress: choose from {choices}")
        return None
    return Pruning(compress, Pruning.layer if layer is None else layer, keep=keep)


def evaluate_folder(
    model_id: str,
    spec: DataSpec,
    batch_size: int = 32,
    device: str | None = None,
    compress: str | None = None,
    keep: int | None = None,
    compress_layer: int | None = None,
    vision_tokens: int | None = None,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> dict[str, Any]:
    """``evaluate`` on a model folder.

    Args:
        compress: operator that removes vision tokens inside the language model, from layer ``compress_layer`` (2) on, down to
            ``keep`` tokens an image.
        trust_remote_code: run the code that the folder brings.
        vision_tokens: of an image, for a compressor that serves several counts; None: as the folder says.
    """
    find_template(spec.template)  # a name that is none shows before anything is loaded
    pruning = pruning_of(compress, keep, compress_layer)
    compressor = None if vision_tokens is None else CompressorSpec("", vision_tokens)
    config = open_student(model_id, trust_remote_code, compressor)[1]
    if pruning:
        pruning.check(config)
    model, processor = load_student(model_id, "sdpa", trust_remote_code, compressor)
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return evaluate(model, processor, spec, batch_size, pruning=pruning, **kwargs)
