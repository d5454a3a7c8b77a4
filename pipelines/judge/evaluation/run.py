"""``kdcli eval``: greedy answers to the questions of a held-out file, scored by family; and how likely the expected answers are.

``nll`` is the mean negative log-likelihood of the expected answer's tokens in nats, teacher-forced on the row as training renders it, the
end-of-turn token included: over the tokens of a family, then the mean of families. It moves with every step, where exact match waits
for an answer to flip. ``ece`` is the expected calibration error of the same tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch

from pipelines.judge.evaluation.answers import (
    MAX_NEW_TOKENS,
    Compression,
    Forced,
    answers_or_skips,
    check_asking,
    expected,
    prompt_of,
)
from pipelines.judge.evaluation.kept import KeepIn, KeptAnswers, identity_of, keeping, set_states, states_of
from pipelines.judge.evaluation.metrics import DEFAULT, metric_module
from pipelines.judge.evaluation.questions import Questions, by_reason, nothing_asked, questions_of, references
from pipelines.judge.evaluation.score import Answer, score
from pipelines.train.run_records import finite
from student_train.compressors import CompressorSpec
from student_train.load_student import load_student, open_student
from student_train.pruning import Pruning, operator_modules
from student_train.student import RowForward
from teacher_cache.capturing.cache_shard import skip_record
from teacher_cache.errors import KdcliError, SkipSample
from teacher_cache.preparing.prepare import Limits, Preparer
from teacher_cache.preparing.templates import find_template
from teacher_cache.records import Sample, SkipRecord
from teacher_cache.sources import DataSpec


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
    read: Questions | None = None,
    kept: KeptAnswers | None = None,
) -> dict[str, Any]:
    """``score`` of the answers, and what could not be scored: no row of the file is left uncounted.

    With ``pruning``, vision tokens are removed inside the language model while it answers, and ``"compression"`` says how.

    Args:
        prompt_suffix: a line appended to every question, for the answer and for nll.
        read: the questions of ``spec``, where they were read already, suffix included.
        kept: answers of before, which are not asked again, and where new ones go.

    Returns:
        ``score``'s figures; ``"rows"`` of the file = ``"n"`` + those of ``"skipped": {reason: rows}``, each of them in ``"skips"``;
        ``"nll_skipped": {reason: rows}`` that were answered but training could not render; ``"answers": [Answer]``.
    """
    check_metrics(metrics)
    if max_new_tokens < 1:
        raise KdcliError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    model.eval()
    check_asking(processor, spec.template)
    questions = read or questions_of(spec, prompt_suffix)
    student, preparer = RowForward(model), Preparer(processor, model.config, Limits(max_length=1 << 60))
    # A generator each: what is kept must not depend on what else is measured.
    compression, forced = (
        Compression(pruning, torch.Generator().manual_seed(0)) if pruning else None for _ in range(2)
    )
    answers, skips = list[Answer](), list(questions.skipped)
    nll_skipped: list[str] = []
    generators = [one.generator for one in (compression, forced) if one]
    before = kept.batches if kept else []
    set_states(generators, kept.draws if kept else ())
    for number, start in enumerate(range(0, len(questions.asked), batch_size)):
        batch = questions.asked[start : start + batch_size]
        if number < len(before):
            rows = before[number]
        else:
            prompts = [prompt_of(row, spec.max_image_pixels) for row in batch]
            said = answers_or_skips(model, processor, prompts, max_new_tokens, compression, template=spec.template)
            rows = [plain(*pair) for pair in zip(said, expected(student, preparer, batch, spec, forced))]
            if kept:
                kept.add(rows, states_of(generators))
        for row, one in zip(batch, rows):
            if "skip" in one:
                skips.append(skip_record(row, SkipSample(*one["skip"])))
                continue
            answers.append(answered(row, one))
            nll_skipped += [one["nll_skip"]] if one["nll_skip"] else []
        advance(len(batch))
    if not answers:
        raise nothing_asked(spec, skips)
    how = {"compression": asdict(pruning)} if pruning else {}
    return {**score(answers, metrics), **how, **uncounted(len(answers), skips, nll_skipped), "answers": answers}


def plain(given: str | SkipSample, meant: Forced) -> dict[str, Any]:
    """What is kept of one question."""
    if isinstance(given, SkipSample):
        return {"skip": [given.reason, given.detail]}
    nats = float(meant.nats.sum())
    return {
        "given": given,
        "nats": nats if math.isfinite(nats) else None,  # of a student that diverged
        "tokens": len(meant.nats),
        "nll_skip": meant.skip and meant.skip.reason,
        **(
            {"sure": meant.sure.tolist(), "right": meant.right.tolist()}
            if math.isfinite(nats)
            else {"sure": [], "right": []}
        ),
    }


def answered(row: Sample, one: Mapping[str, Any]) -> Answer:
    family, asked, wanted = str(row.extra.get("family", row.part)), row.turns[-2].text, row.turns[-1].text
    nats = math.nan if one["nats"] is None else one["nats"]
    tops = tuple(zip(one["sure"], one["right"]))
    return Answer(family, asked, wanted, one["given"], nats, one["tokens"], references(row), tops)


def uncounted(answered: int, skips: Sequence[SkipRecord], nll_skipped: Sequence[str]) -> dict[str, Any]:
    """What a result says of the rows that it has no answer, or no nll, of."""
    return {
        "rows": answered + len(skips),
        "skipped": by_reason(one.reason for one in skips),
        "nll_skipped": by_reason(nll_skipped),
        "skips": [{"place": one.place, "reason": one.reason, "detail": one.detail} for one in skips],
    }


def figures(result: Mapping[str, Any]) -> dict[str, Any]:
    """A result without its single rows: what score files keep. The nll of a student that diverged is no number: null."""
    return finite({name: value for name, value in result.items() if name not in ("answers", "skips")})


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
    return Pruning(compress, layer, keep=keep)  # type: ignore[arg-type]


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
    kept_in: KeepIn | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """``evaluate`` on a model folder.

    Args:
        compress: operator that removes vision tokens inside the language model, from layer ``compress_layer`` (2) on, down to
            ``keep`` tokens an image.
        trust_remote_code: run the code that the folder brings.
        vision_tokens: of an image, for a compressor that serves several counts; None: as the folder says.
        kept_in: where answers are kept while they are made: the same call goes on from them.
    """
    find_template(spec.template)  # a name that is none shows before anything is loaded
    check_metrics(metrics)
    pruning = pruning_of(compress, keep, compress_layer)
    check_answering(model_id, pruning, vision_tokens, trust_remote_code)
    read = questions_of(spec, prompt_suffix)
    how = {"template": spec.template, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
    how |= {"compression": pruning and asdict(pruning), "vision_tokens": vision_tokens}
    with keeping(kept_in, identity_of(model_id, read.asked, how)) if kept_in else nullcontext() as kept:
        model, processor = load_answering(model_id, pruning, vision_tokens, device, trust_remote_code)
        asked: dict[str, Any] = {"metrics": metrics, "max_new_tokens": max_new_tokens, "prompt_suffix": prompt_suffix}
        return evaluate(model, processor, spec, batch_size, pruning=pruning, read=read, kept=kept, **asked, **kwargs)


def load_answering(
    model_id: str,
    pruning: Pruning | None = None,
    vision_tokens: int | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple[Any, Any]:
    """(model on its device, processor) of a folder; what cannot be is refused before any weights are read."""
    compressor = check_answering(model_id, pruning, vision_tokens, trust_remote_code)
    model, processor = load_student(model_id, "sdpa", trust_remote_code, compressor)
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"), dtype), processor


def check_answering(
    model_id: str, pruning: Pruning | None, vision_tokens: int | None, trust_remote_code: bool
) -> CompressorSpec | None:
    """The compressor that is asked for; KdcliError where this model cannot answer so, from its configuration alone."""
    compressor = None if vision_tokens is None else CompressorSpec("", vision_tokens)
    config = open_student(model_id, trust_remote_code, compressor)[1]
    if pruning:
        pruning.check(config)
    return compressor
