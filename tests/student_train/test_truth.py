"""Every LLaVA-KD term, from the cache by the product's own path, against the live teacher in float64.

The reference shares no code with the product: it renders, finds answer tokens by their marks, runs the whole models, and writes
the paper's formulas down over full logits.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from torch.nn.functional import cosine_similarity

from tests.exhaustive import of_all

ROWS = 35
EVERYTHING = {"parts": ("caption", "sft", "talk"), "per_device_train_batch_size": ROWS}
TERMS = ("reg", "res", "vis", "rel")


@dataclass(frozen=True)
class Live:
    """One row as a model says it, float64: logits ``[R, V]`` on answer tokens (row before the token) and on vision tokens."""

    response: torch.Tensor
    labels: torch.Tensor
    vision: torch.Tensor
    hidden: Mapping[str, torch.Tensor]
    head: torch.Tensor


def answer_positions(ids: list[int], tokenizer: Any, plain: bool, image: int) -> list[int]:
    """Label tokens: all text of a plain row; in a chat from behind ``<|assistant|>`` to ``<|end|>``, that included."""
    if plain:
        return [i for i, token in enumerate(ids) if token != image]
    begin, end = tokenizer.convert_tokens_to_ids(["<|assistant|>", "<|end|>"])
    inside, found = False, []
    for i, token in enumerate(ids):
        if inside:
            found.append(i)
        inside = (inside and token != end) or token == begin
    return found


def as_text(sample: Any, plain: bool) -> str:
    if plain:
        return "<image>" * len(sample.images) + sample.turns[1].text + "\n"
    # the placeholder stands first in its turn, and the template sets one newline behind it
    turns = [f"<|{turn.role}|>{turn.text}<|end|>" for turn in sample.turns]
    return "".join(turns)


@torch.no_grad()
def live_rows(folder: Path, mixture: tuple[Any, ...]) -> list[Live]:
    """Every usable row of the mixture, one forward each, no batch, no padding."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from teacher_cache.errors import SkipSample
    from teacher_cache.records import SkipRecord
    from teacher_cache.sources import open_source
    from teacher_cache.sources.usable_samples import check_sample

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64).eval()
    processor = AutoProcessor.from_pretrained(folder)
    image, found = model.config.image_token_id, []
    for spec in mixture:
        source = open_source(spec)
        for sample in (row for group in source.scan(500) for row in source.read(group)):
            try:
                if isinstance(sample, SkipRecord) or check_sample(sample, 10**8):
                    continue
            except SkipSample:
                continue
            pictures = [PIL.Image.open(io.BytesIO(one.data)).convert("RGB") for one in sample.images]
            text = as_text(sample, spec.template == "plain")
            inputs = processor(text=[text], images=pictures or None, return_tensors="pt")
            if pictures:
                inputs["pixel_values"] = inputs["pixel_values"].double()
            ids = inputs["input_ids"][0]
            out = model(**inputs, output_hidden_states=True)
            labels = answer_positions(ids.tolist(), processor.tokenizer, spec.template == "plain", image)
            rows = {"response": torch.tensor(labels) - 1, "vision": torch.nonzero(ids == image).flatten()}
            states = {kind: out.hidden_states[-1][0][at] for kind, at in rows.items()}
            logits = {kind: out.logits[0][at] for kind, at in rows.items()}
            head = model.get_output_embeddings().weight.detach()
            found.append(Live(logits["response"], ids[labels], logits["vision"], states, head))
    return found


def divergence(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """KL(p_t ‖ p_s) of every row, over the teacher's vocabulary."""
    log_p, log_q = teacher.log_softmax(1), student[:, : teacher.shape[1]].log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def relation(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    student = student[:, : teacher.shape[1]]
    return 1 - cosine_similarity((teacher @ teacher.T).flatten(), (student @ student.T).flatten(), dim=0)


def reference(teacher: list[Live], student: list[Live], drop: int = 0, total: bool = False) -> dict[str, float]:
    """The four terms over all rows of all samples; ``total``: KLs summed over a sample's rows, averaged over samples."""
    pairs = list(zip(teacher, student))

    def joined(values: list[torch.Tensor]) -> float:
        filled = [one for one in values if len(one)]
        return float(torch.stack([one.sum() for one in filled]).mean() if total else torch.cat(filled).mean())

    entropy = [-s.response.log_softmax(1)[torch.arange(len(s.labels)), s.labels] for s in student]
    return {
        "reg": float(torch.cat(entropy).mean()),
        "res": joined([divergence(t.response, s.response) for t, s in pairs]),
        "vis": joined([divergence(t.vision[drop:], s.vision[drop:]) for t, s in pairs]),
        "rel": float(
            torch.stack([relation(t.vision[drop:], s.vision[drop:]) for t, s in pairs if len(t.vision)]).mean()
        ),
    }


def check(result: Any, expected: Mapping[str, float], weights: Mapping[str, float], rtol: float = 2e-5) -> None:
    assert set(result.terms) == set(expected)
    for name in TERMS:
        assert result.terms[name] == pytest.approx(expected[name], rel=rtol, abs=1e-6), name
    total = sum(weights[name] * expected[name] for name in TERMS)
    assert result.loss == pytest.approx(total, rel=rtol)


PAPER = {"reg": 1.0, "res": 1.0, "vis": 1.0, "rel": 0.5}
CODE = {**PAPER, "rel": 1.0}


def cropped(rows: list[Live], tokenizer_length: int) -> list[Live]:
    """The teacher without the padding columns of its head."""
    length = tokenizer_length
    return [Live(r.response[:, :length], r.labels, r.vision[:, :length], r.hidden, r.head[:length]) for r in rows]


@pytest.fixture(scope="module")
def teacher_rows(tiny_teacher: Path, rich_mixture: Any, teacher_parts: Any) -> list[Live]:
    return cropped(live_rows(tiny_teacher, rich_mixture), len(teacher_parts[0].tokenizer))


@pytest.fixture(scope="module")
def student_rows(tiny_student: Path, rich_mixture: Any) -> list[Live]:
    return live_rows(tiny_student, rich_mixture)


def test_the_mixture_has_everything(teacher_rows: list[Live], tiny_teacher: Path) -> None:
    vision = [len(row.vision) for row in teacher_rows]
    assert len(vision) == ROWS and {0, 36, 72} == set(vision)


def test_every_term_equals_the_live_teacher(
    first_step: Callable[..., Any], rich_cache: Any, teacher_rows: list[Live], student_rows: list[Live]
) -> None:
    """float32 hidden states; float32 arithmetic is all that differs."""
    check(first_step(rich_cache(), **EVERYTHING), reference(teacher_rows, student_rows), PAPER)


def test_preset_code_leaves_out_the_first_vision_row(
    first_step: Callable[..., Any], rich_cache: Any, teacher_rows: list[Live], student_rows: list[Live]
) -> None:
    result = first_step(rich_cache(), preset="code", **EVERYTHING)
    check(result, reference(teacher_rows, student_rows, drop=1), CODE)


def test_reduction_sum_adds_a_samples_rows(
    first_step: Callable[..., Any], rich_cache: Any, teacher_rows: list[Live], student_rows: list[Live]
) -> None:
    result = first_step(rich_cache(), knobs={"reduction": "sum"}, **EVERYTHING)
    check(result, reference(teacher_rows, student_rows, total=True), PAPER)


@pytest.mark.parametrize("grouping", [(1, 35), (2, 18), (7, 5)], ids=lambda g: f"{g[1]} of {g[0]}")
def test_grouping_and_padding_have_no_effect(
    first_step: Callable[..., Any],
    rich_cache: Any,
    teacher_rows: list[Live],
    student_rows: list[Live],
    grouping: tuple[int, int],
) -> None:
    """The same rows in micro-batches of 1 (no padding at all), 2 and 7, next to the one padded batch above."""
    size, count = grouping
    sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": count}
    check(first_step(rich_cache(), **{**EVERYTHING, **sizes}), reference(teacher_rows, student_rows), PAPER)


@pytest.mark.parametrize("padding", [0, 40])
def test_heads_of_other_widths(
    first_step: Callable[..., Any],
    rich_cache: Any,
    rich_mixture: Any,
    teacher_rows: list[Live],
    tiny_student: Path,
    tmp_path: Path,
    padding: int,
) -> None:
    """A student head just as long as the tokenizer, or with more padding than the teacher's: columns without meaning do not count."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(tiny_student, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(tiny_student)
    model.resize_token_embeddings(len(processor.tokenizer) + padding, mean_resizing=False)
    model.save_pretrained(tmp_path / "student")
    processor.save_pretrained(tmp_path / "student")
    result = first_step(rich_cache(), student=tmp_path / "student", **EVERYTHING)
    check(result, reference(teacher_rows, live_rows(tmp_path / "student", rich_mixture)), PAPER)


def bf16_bound(teacher: list[Live], student: list[Live], kind: str) -> float:
    """How far a mean KL may move when every hidden entry is off by 2^-9 of itself, to first order.

    ∂KL/∂z_i = p_i (log p_i − log q_i − KL), |δz_i| ≤ 2^-9 Σ_d |h_d w_id|.
    """
    worst = []
    for t, s in zip(teacher, student):
        theirs, ours = getattr(t, kind), getattr(s, kind)
        log_p, log_q = theirs.log_softmax(1), ours[:, : theirs.shape[1]].log_softmax(1)
        slope = log_p.exp() * (log_p - log_q - divergence(theirs, ours)[:, None]).abs()
        worst.append((slope * (t.hidden[kind].abs() @ t.head.abs().T) * 2**-9).sum(1))
    return float(torch.cat(worst).mean())


def test_bfloat16_hidden_states_stay_within_their_rounding(
    first_step: Callable[..., Any], rich_cache: Any, teacher_rows: list[Live], student_rows: list[Live]
) -> None:
    result = first_step(rich_cache("bf16"), **EVERYTHING)
    expected = reference(teacher_rows, student_rows)
    for name, kind in (("res", "response"), ("vis", "vision")):
        bound = bf16_bound(teacher_rows, student_rows, kind)
        assert abs(result.terms[name] - expected[name]) <= bound
        assert bound < 0.05 * expected[name], "the bound itself says something"
    # each logit is off by at most 2^-9 of |h|·|w|, a Gram entry by a few of these: the angle moves by no more
    assert result.terms["rel"] == pytest.approx(expected["rel"], abs=2**-7)
    assert result.terms["reg"] == pytest.approx(expected["reg"], rel=2e-5)


def test_bfloat16_field_is_exact_for_the_rounded_teacher(
    first_step: Callable[..., Any], rich_cache: Any, teacher_rows: list[Live], student_rows: list[Live]
) -> None:
    """Rounding the live hidden states in the reference leaves float32 arithmetic as the only difference."""

    def rounded(row: Live) -> Live:
        states = {kind: one.float().bfloat16().double() for kind, one in row.hidden.items()}
        head = row.head.double()
        return Live(states["response"] @ head.T, row.labels, states["vision"] @ head.T, states, head)

    result = first_step(rich_cache("bf16"), **EVERYTHING)
    # float64 and float32 states round to different bfloat16 neighbours here and there: rare, and worth 2^-8 of one entry
    check(result, reference([rounded(row) for row in teacher_rows], student_rows), PAPER, rtol=1e-3)


def bucketed(teacher: torch.Tensor, student: torch.Tensor, k: int) -> torch.Tensor:
    """KL with everything outside the teacher's k largest as one outcome."""
    ids = teacher.topk(k, dim=1).indices
    outside = torch.ones_like(teacher, dtype=torch.bool).scatter(1, ids, False)

    def merge(logits: torch.Tensor) -> torch.Tensor:
        rest = logits[outside].reshape(len(logits), -1).logsumexp(1, keepdim=True)
        return torch.cat([logits.gather(1, ids), rest], dim=1)

    return divergence(merge(teacher), merge(student[:, : teacher.shape[1]]))


TOPK_FIELDS = ("response_topk", "vision_topk", "relation")


@pytest.mark.parametrize(
    "codec, rtol",
    of_all([("fp32", 2e-5), ("bf16", 2e-3)], ("fp32", 2e-5)),
    ids=["float32 log-probs", "float16 log-probs"],
)
def test_top_k_alone_is_a_lower_bound_that_closes(
    first_step: Callable[..., Any],
    rich_cache: Any,
    teacher_rows: list[Live],
    student_rows: list[Live],
    codec: str,
    rtol: float,
) -> None:
    """What is lost is the tail's own divergence (chain rule of the KL), nothing else; the relation field is the exact Gram."""
    dense, before = reference(teacher_rows, student_rows), dict.fromkeys(("res", "vis"), float("inf"))
    for k in (4, 64):
        result = first_step(rich_cache(codec, k, TOPK_FIELDS), **EVERYTHING)
        for name, kind in (("res", "response"), ("vis", "vision")):
            pairs = [(getattr(t, kind), getattr(s, kind)) for t, s in zip(teacher_rows, student_rows)]
            expected = float(torch.cat([bucketed(t, s, k) for t, s in pairs if len(t)]).mean())
            assert result.terms[name] == pytest.approx(expected, rel=rtol)
            gap = dense[name] - result.terms[name]
            assert 0 < gap < before[name]
            before[name] = gap
        assert result.terms["reg"] == pytest.approx(dense["reg"], rel=2e-5)
        # the triangle is stored in float16: 2^-11 of an entry
        assert result.terms["rel"] == pytest.approx(dense["rel"], abs=2**-10)
