"""Coefficients of a sketch, corrected by what the exact head says of their error."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.demo.run import TEACHER
from student_train.distributions import HeadAndSketch
from student_train.head_correction import GATHERED_BYTES, HEAD_ERROR, corrected
from teacher_cache.codecs import container
from teacher_cache.fields import create_field
from teacher_cache.models.head import topk_rows
from teacher_cache.models.low_rank import LowRankHead
from teacher_cache.records import TeacherOutput
from teacher_cache.signal_records import Sketch, TopK
from tests.close import assert_close

V, D, ROWS = 400, 24, 12


def stored(
    k: int, step: float, scale: float = 3.0, finest: float | None = None
) -> tuple[Sketch, TopK, LowRankHead, torch.Tensor]:
    """(a rounded sketch, the exact head, W′ with the step, exact logits float64). finest: rounded to that instead."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(V, D, generator=generator)
    hidden = torch.randn(ROWS, D, generator=generator) * scale
    centre = weight.mean(dim=0)
    width = finest or step
    sketch = Sketch((hidden / width).round() * width, hidden @ centre)
    head = LowRankHead(weight - centre, torch.zeros(V), step)
    return sketch, topk_rows(hidden, weight, k), head, hidden.double() @ weight.double().T


def by_least_squares(sketch: Sketch, topk: TopK, head: LowRankHead) -> torch.Tensor:
    """float64 ``[R, r]``, row by row: ε of least Σ (ε / σ_sketch)² + Σ (residual / σ_head)²."""
    assert head.step is not None
    found = []
    for row in range(len(topk)):
        told = torch.isfinite(topk.log_probs[row])
        ids = topk.ids[row][told]
        weight = head.weight[ids].double().numpy()
        y = sketch.coefficients[row].double().numpy()
        z = (topk.log_probs[row][told].double() + topk.log_z[row] - head.bias[ids] - sketch.mean_logit[row]).numpy()
        sigma = head.step / 12**0.5
        system = np.concatenate([np.eye(len(y)) / sigma, weight / HEAD_ERROR])
        values = np.concatenate([np.zeros(len(y)), (z - weight @ y) / HEAD_ERROR])
        found.append(y + np.linalg.lstsq(system, values, rcond=None)[0])
    return torch.from_numpy(np.stack(found))


@pytest.mark.parametrize("k", [1, 8, 40, V])
@pytest.mark.parametrize("step", [0.02, 0.4])
def test_as_least_squares_row_by_row(k: int, step: float) -> None:
    """Fewer entries than dimensions, more, and all."""
    sketch, topk, head, _ = stored(k, step)
    ours = corrected(sketch, topk, head)
    expected = by_least_squares(sketch, topk, head)
    assert_close((ours.coefficients - sketch.coefficients).double(), expected - sketch.coefficients, 2e-3, step)
    assert ours.mean_logit is sketch.mean_logit


@pytest.mark.parametrize("k", [1, 8])
def test_the_heads_logits_come_near(k: int) -> None:
    """Every row's, and the others' by no less than chance has it."""
    sketch, topk, head, exact = stored(k, 0.4)
    ours = corrected(sketch, topk, head)
    before, after = ((head.logits(one) - exact) for one in (sketch, ours))
    assert (after.gather(1, topk.ids).norm(dim=1) < 0.1 * before.gather(1, topk.ids).norm(dim=1)).all()
    assert float(after.scatter(1, topk.ids, 0.0).norm()) < float(before.scatter(1, topk.ids, 0.0).norm())


def test_an_exact_sketch_stays() -> None:
    sketch, topk, head, _ = stored(8, 0.1, finest=2.0**-20)
    assert_close(corrected(sketch, topk, head).coefficients, sketch.coefficients, 1e-5)


def test_a_sketch_of_unknown_step_stays() -> None:
    sketch, topk, head, _ = stored(8, 0.1)
    assert corrected(sketch, topk, LowRankHead(head.weight, head.bias)) is sketch


def test_entries_without_mass_say_nothing() -> None:
    """As if the head ended before them; a row that has nothing else stays."""
    sketch, topk, head, _ = stored(8, 0.2)
    topk.log_probs[3, 5:] = -torch.inf
    topk.log_probs[4] = -torch.inf
    ours = corrected(sketch, topk, head).coefficients
    five = TopK(topk.ids[3:4, :5], topk.log_probs[3:4, :5], topk.log_tail[3:4], topk.log_z[3:4])
    assert_close(ours[3:4], corrected(sketch[3:4], five, head).coefficients, 1e-5)
    assert torch.equal(ours[4], sketch.coefficients[4])


def test_tokens_that_share_a_row_of_the_head() -> None:
    """The system is singular but for the head's own error."""
    sketch, topk, head, _ = stored(8, 0.4, scale=100.0)
    head.weight[topk.ids[0]] = head.weight[topk.ids[0, 0]].clone()
    assert torch.isfinite(corrected(sketch, topk, head).coefficients).all()


def test_no_rows_and_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    sketch, topk, head, _ = stored(8, 0.2)
    assert len(corrected(sketch[0:0], topk[0:0], head)) == 0
    whole = corrected(sketch, topk, head).coefficients
    assert whole.numel() * 8 * 4 < GATHERED_BYTES, "one piece"
    monkeypatch.setattr("student_train.head_correction.GATHERED_BYTES", 5 * 4 * 8 * D)
    assert_close(corrected(sketch, topk, head).coefficients, whole, 1e-6)
    assert torch.equal(corrected(sketch, topk, head).coefficients, corrected(sketch, topk, head).coefficients)


@cache
def trained_rows() -> tuple[torch.Tensor, torch.Tensor]:
    """(hidden states ``[640, 256]`` of the shipped teacher on tokens of its vocabulary, its head)."""
    from transformers import AutoModelForImageTextToText

    model: Any = AutoModelForImageTextToText.from_pretrained(TEACHER, dtype=torch.float32).eval()
    ids = torch.randint(300, 4000, (10, 64), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        hidden = model.model.language_model(input_ids=ids).last_hidden_state.flatten(0, 1)
    return hidden.clone(), model.get_output_embeddings().weight.detach()


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("step", [0.1, 0.4])
def test_divergence_falls_on_rows_of_a_trained_model(step: float, temperature: float) -> None:
    """Through the real fields, rows that nothing was fitted on."""
    hidden, weight = trained_rows()
    said = [
        TeacherOutput({"response": one}, {"response": topk_rows(one, weight, 8)})
        for one in (hidden[:512], hidden[512:])
    ]
    parts: list[Any] = []
    for name, params in (("response_topk", {"k": 8}), ("response_hidden", {"codec": "sketch", "step": step})):
        field: Any = create_field(name, params)
        fitted = field.fit(said[:1], weight)
        field = field.with_calibration(fitted.tensors)
        parts.append(field.decode(container.unpack(container.pack(field.encode(None, said[1])))))
    low_rank = LowRankHead(fitted.low_rank_head["weight"], fitted.low_rank_head["bias"], step).to(torch.device("cpu"))
    exact = (hidden[512:] @ weight.T / temperature).double().log_softmax(dim=1)

    def divergence(teacher: HeadAndSketch) -> float:
        return float((exact.exp() * (exact - teacher.log_probs(temperature).double())).sum(dim=1).mean())

    before, after = divergence(HeadAndSketch(*parts, low_rank)), divergence(HeadAndSketch.of(*parts, low_rank))
    assert after < before
