"""``kdcli eval``: greedy answers to the questions of a held-out file, exact match by family."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from teacher_cache.cache_shard import skip_record
from teacher_cache.errors import DataError, SkipRow
from teacher_cache.prepare import PLACEHOLDER, content
from teacher_cache.records import Sample, SkipRecord
from teacher_cache.rows import check_sample, decode_image
from teacher_cache.sources import DataSpec, open_source

MAX_NEW_TOKENS = 32


@dataclass(frozen=True)
class Answer:
    """One scored question. family: the row's ``family`` column, or its part."""

    family: str
    question: str
    expected: str
    given: str

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
) -> list[str]:
    """Greedy answers to each row's last user turn, given the turns before it."""
    tokenizer = processor.tokenizer
    texts, images = [], []
    for row in questions:
        asked = row.turns[:-1]
        messages = [{"role": turn.role, "content": content(turn.text)} for turn in asked]
        owner = processor if processor.chat_template else tokenizer
        texts.append(owner.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        kept = sum(turn.text.count(PLACEHOLDER) for turn in asked)
        images += [decode_image(image, max_image_pixels) for image in row.images[:kept]]
    arguments = {"images": images} if images else {}
    inputs = processor(
        text=texts, **arguments, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
    ).to(model.device)
    generated = model.generate(
        **inputs, do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id or 0
    )
    return tokenizer.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def evaluate(
    model: Any, processor: Any, spec: DataSpec, batch_size: int = 32, advance: Callable[[int], None] = lambda rows: None
) -> dict[str, Any]:
    """``{"exact_match": mean over rows, "families": {name: {"n", "exact_match"}}, "skipped": {...}, "answers": [Answer]}``."""
    model.eval()
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
        for row, given in zip(batch, answer(model, processor, batch, max_image_pixels=spec.max_image_pixels)):
            family = str(row.extra.get("family", row.part))
            answers.append(Answer(family, row.turns[-2].text, row.turns[-1].text, given))
        advance(len(batch))
    return {**score(answers), "skipped": dict(skipped), "answers": answers}


def score(answers: Sequence[Answer]) -> dict[str, Any]:
    """Exact match over all rows, over families (each counts the same), and by family."""
    by_family: dict[str, list[bool]] = defaultdict(list)
    for one in answers:
        by_family[one.family].append(one.correct)
    families = {
        name: {"n": len(hits), "exact_match": sum(hits) / len(hits)} for name, hits in sorted(by_family.items())
    }
    means = [one["exact_match"] for one in families.values()]
    return {
        "n": len(answers),
        "exact_match": sum(one.correct for one in answers) / max(1, len(answers)),
        "family_mean": sum(means) / max(1, len(means)),
        "families": families,
    }


def evaluate_folder(
    model_id: str, spec: DataSpec, batch_size: int = 32, device: str | None = None, **kwargs: Any
) -> dict[str, Any]:
    """``evaluate`` on a model folder."""
    from student_train.student import load_student

    model, processor = load_student(model_id, "sdpa")
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return evaluate(model, processor, spec, batch_size, **kwargs)
