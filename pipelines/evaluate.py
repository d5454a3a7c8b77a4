"""``kdcli eval``: greedy answers to the questions of a held-out file, scored by family; and how likely the expected answers are.

``nll`` is the mean negative log-likelihood of the expected answer's tokens in nats, teacher-forced on the row as training renders it, the
end-of-turn token included: over the tokens of a family, then the mean of families. It moves with every step, where exact match waits
for an answer to flip.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from pipelines.evaluation.answers import MAX_NEW_TOKENS, Compression, answer_nats, answers_or_none, prompt_of
from pipelines.evaluation.metrics import DEFAULT, metric_module
from pipelines.evaluation.questions import read_questions, references, with_suffix
from pipelines.evaluation.score import Answer, score
from student_train.compressors import CompressorSpec
from student_train.pruning import Pruning, operator_modules
from student_train.student import RowForward, load_student, open_student
from teacher_cache.errors import DataError, KdcliError
from teacher_cache.prepare import Limits, Preparer
from teacher_cache.records import Sample, SkipRecord
from teacher_cache.sources import DataSpec
from teacher_cache.templates import find_template


def evaluate(
    model: Any,
    processor: Any,
    spec: DataSpec,
    batch_size: int = 32,
    advance: Callable[[int], None] = lambda rows: None,
    pruning: Pruning | None = None,
    metrics: Sequence[str] = DEFAULT,
    max_new_tokens: int = MAX_NEW_TOKENS,
    prompt_suffix: str = "",
) -> dict[str, Any]:
    """``score`` of the answers, and ``"skipped": {reason: rows}``, ``"answers": [Answer]``.

    With ``pruning``, vision tokens are removed inside the language model while it answers, and ``"compression"`` says how.

    Args:
        prompt_suffix: a line appended to every question, for the answer and for nll.
    """
    check_metrics(metrics)
    if max_new_tokens < 1:
        raise KdcliError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    model.eval()
    questions, skipped = usable_questions(spec, prompt_suffix)
    student, preparer = RowForward(model), Preparer(processor, model.config, Limits(max_length=1 << 60))
    # A generator each: what is kept must not depend on what else is measured.
    compression, forced = (
        Compression(pruning, torch.Generator().manual_seed(0)) if pruning else None for _ in range(2)
    )
    answers: list[Answer] = []
    for start in range(0, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        prompts = [prompt_of(row, spec.max_image_pixels) for row in batch]
        said = answers_or_none(model, processor, prompts, max_new_tokens, compression, template=spec.template)
        for row, given, (nats, tokens) in zip(batch, said, answer_nats(student, preparer, batch, spec, forced)):
            if given is None:
                skipped["processor_refused"] = skipped.get("processor_refused", 0) + 1  # or too large inside it
                continue
            family, asked, meant = str(row.extra.get("family", row.part)), row.turns[-2].text, row.turns[-1].text
            answers.append(Answer(family, asked, meant, given, nats, tokens, references(row)))
        advance(len(batch))
    how = {"compression": asdict(pruning)} if pruning else {}
    return {**score(answers, metrics), **how, "skipped": skipped, "answers": answers}


def usable_questions(spec: DataSpec, prompt_suffix: str = "") -> tuple[list[Sample], dict[str, int]]:
    """(rows that can be scored, rows that cannot by reason); DataError where none can."""
    questions: list[Sample] = []
    skipped: dict[str, int] = defaultdict(int)
    for row in read_questions(spec):
        if isinstance(row, SkipRecord):
            skipped[row.reason] += 1
        else:
            questions.append(with_suffix(row, prompt_suffix))
    if not questions:
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items()) or "it is empty"
        raise DataError(f"{spec.path}: no row can be scored ({reasons})")
    return questions, dict(skipped)


def check_metrics(names: Sequence[str]) -> None:
    """KdcliError listing the choices, before anything is loaded."""
    if isinstance(names, str):
        raise KdcliError(f'metrics must be a list of names, e.g. ["{names}"], got {names!r}')
    for name in names:
        metric_module(name)


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
    metrics: Sequence[str] = DEFAULT,
    max_new_tokens: int = MAX_NEW_TOKENS,
    prompt_suffix: str = "",
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
    check_metrics(metrics)
    pruning = pruning_of(compress, keep, compress_layer)
    model, processor = load_answering(model_id, pruning, vision_tokens, device, trust_remote_code)
    asked: dict[str, Any] = {"metrics": metrics, "max_new_tokens": max_new_tokens, "prompt_suffix": prompt_suffix}
    return evaluate(model, processor, spec, batch_size, pruning=pruning, **asked, **kwargs)


def load_answering(
    model_id: str,
    pruning: Pruning | None = None,
    vision_tokens: int | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple[Any, Any]:
    """(model on its device, processor) of a folder; what cannot be is refused before any weights are read."""
    compressor = None if vision_tokens is None else CompressorSpec("", vision_tokens)
    config = open_student(model_id, trust_remote_code, compressor)[1]
    if pruning:
        pruning.check(config)
    model, processor = load_student(model_id, "sdpa", trust_remote_code, compressor)
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"), dtype), processor
