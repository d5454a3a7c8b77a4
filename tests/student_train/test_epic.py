"""EPIC: its schedules as written, its two passes against the plain pruned forward, and what a run of it does at its end."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from student_train.load_student import load_student
from student_train.methods import create_method
from student_train.pruning import Descending, Pruning
from student_train.student import RowForward, asking_rows
from teacher_cache.errors import CompatibilityError, KdcliError
from tests.student_train.pruning.plain import pruned_states


def drawn(method: Any, progress: float, draws: int = 400) -> torch.Tensor:
    """``[draws, 2]``: removed by student and teacher."""
    generator = torch.Generator().manual_seed(0)
    passes = [method.passes(progress, generator) for _ in range(draws)]
    plain = [(one.student, one.teacher) for one in passes]
    return torch.tensor([[getattr(one, "pruning", one).removed for one in pair] for pair in plain], dtype=torch.float64)


@pytest.mark.parametrize("name", ["epic-tcd", "epic-lcd"])
@pytest.mark.parametrize(
    ("progress", "least", "most", "gap"),
    [(0.0, 0.1, 0.1, 0.1), (0.25, 0.14, 0.26, 0.225), (0.5, 0.18, 0.42, 0.3), (1.0, 0.26, 0.74, 0.3)],
)
def test_ratios(name: str, progress: float, least: float, most: float, gap: float) -> None:
    student, teacher = drawn(create_method(name), progress).T
    assert student.min() >= least - 1e-9 and student.max() <= most + 1e-9
    width = most - least
    assert student.min() <= least + 0.05 * width + 1e-9 and student.max() >= most - 0.05 * width - 1e-9
    assert abs(float(student.mean()) - (least + most) / 2) <= 0.06 * width + 1e-9
    torch.testing.assert_close(teacher, (student - gap).clamp_min(0), atol=1e-9, rtol=0)


def test_the_layer_comes_down() -> None:
    """From the last to ℓ_min over the stage, halves up; token distillation stays at its layer."""
    method = create_method("epic-lcd", knobs={"lowest_layer": 2})
    layers = [method.passes(p, torch.Generator()).student.at(32).layer for p in (0.0, 0.25, 0.5, 0.55, 1.0)]
    assert layers == [32, 25, 17, 16, 2]
    assert Descending(Pruning("random", 1, removed=0.5), 0.5).at(2).layer == 2
    assert create_method("epic-tcd").passes(0.7, torch.Generator()).student.at(32).layer == 2


def test_weights_and_presets() -> None:
    paper, code = create_method("epic-tcd"), create_method("epic-tcd", "code")
    assert {n: (t.weight, t.rows) for n, t in paper.terms().items()} == {
        "reg": (pytest.approx(0.3), "response"),
        "self": (0.7, "response"),
    }
    assert {n: (t.weight, t.rows) for n, t in code.terms().items()} == {
        "reg": (0.5, "response"),
        "self": (0.5, "answer"),
    }
    warm = create_method("epic-tcd", knobs={"temperature": 2.0})
    assert warm.terms()["self"].weight == pytest.approx(0.7 * 4)
    plain = create_method("epic-tcd", knobs={"kd_weight": 0.0})
    assert not plain.needs() and set(plain.terms()) == {"reg"} and not plain.passes(0.5, torch.Generator()).self_teacher


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"kd_weight": 1.5}, "from 0 to 1"),
        ({"temperature": 0.0}, "above 0"),
        ({"kd_rows": "vision"}, "response or answer"),
        ({"operator": "none"}, "choose from dart, fastv, pyramiddrop, random"),
        ({"layer": 0}, "at least 1"),
    ],
)
def test_refused(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(KdcliError, match=message):
        create_method("epic-tcd", knobs=knobs)


def test_a_student_that_cannot_lose_tokens_is_refused_by_its_configuration() -> None:
    import transformers

    with pytest.raises(CompatibilityError, match="cannot be removed inside"):
        create_method("epic-tcd").check_student(transformers.Qwen3VLConfig(), {})
    small = transformers.LlavaConfig(text_config=transformers.LlamaConfig(num_hidden_layers=2), image_token_id=3)
    with pytest.raises(KdcliError, match="layer 5 is outside the model"):
        create_method("epic-lcd", knobs={"lowest_layer": 5}).check_student(small, {})


@pytest.fixture
def stage(open_stage: Callable[..., Any], tiny_cache: Path) -> Callable[..., tuple[Any, list[Any]]]:
    """``stage(method, knobs, …)`` → (trainer of 10 steps, the micro-batches of its first step)."""

    def open_(method: str, knobs: dict[str, Any], preset: str = "paper", **settings: Any) -> tuple[Any, list[Any]]:
        given = {
            "max_steps": 10,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "seed": 1,
            **settings,
        }
        trainer, batches_from = open_stage(
            tiny_cache, method=method, knobs=knobs, preset=preset, parts=("caption", "sft"), **given
        )
        return trainer, next(iter(batches_from(0)))[1]

    return open_


@pytest.mark.parametrize("preset", ["paper", "code"])
def test_one_step_is_the_formula(stage: Any, tiny_student: Path, preset: str) -> None:
    """Loss of a late step, row by row from the plain pruned forward: (1-λ)·CE + λ·KL of the two passes."""
    trainer, batches = stage("epic-tcd", {"layer": 1, "operator": "dart"}, preset)
    step = 8
    expected = by_hand(trainer, batches, step, str(tiny_student))
    result = trainer.step(step, batches)
    assert result.terms["self"] > 1e-3
    assert result.terms["reg"] == pytest.approx(expected["reg"], rel=1e-4)
    assert result.terms["self"] == pytest.approx(expected["self"], rel=1e-3)
    kd_weight = trainer.method.kd_weight
    assert result.loss == pytest.approx((1 - kd_weight) * expected["reg"] + kd_weight * expected["self"], rel=1e-3)


@torch.no_grad()
def by_hand(trainer: Any, batches: list[Any], step: int, student: str) -> dict[str, float]:
    model, _ = load_student(student, "eager")
    cross_entropies, divergences = [], []
    for number, one in enumerate(batches):
        passes = trainer.method.passes(step / trainer.total_steps, trainer._generator(step, number))
        batch = one.batch
        length, asking, pixels = batch.inputs["input_ids"].shape[1], asking_rows(batch), 0
        for sample, valid in enumerate(batch.inputs["attention_mask"].bool()):
            ids = batch.inputs["input_ids"][sample, valid]
            images = batch.counts["vision"][sample] // 36
            own = {"pixel_values": batch.inputs["pixel_values"][pixels : pixels + images]} if images else {}
            pixels += images
            said = []
            for pruning in (passes.student, passes.teacher):
                states, rows = pruned_states(
                    model, ids, own, pruning, [row for row in asking[sample].tolist() if row >= 0], images
                )
                said.append({row: model.lm_head(state).log_softmax(0) for row, state in zip(rows, states)})
            at = {
                kind: batch.rows[kind].split(list(batch.counts[kind]))[sample] - sample * length
                for kind in ("response", "answer")
            }
            cross_entropies += [-said[0][row][ids[row + 1]] for row in at["response"].tolist()]
            for row in at[trainer.method.kd_rows].tolist():
                ours, theirs = said[0][row], said[1][row]
                divergences.append((theirs.exp() * (theirs - ours)).sum())
    return {"reg": float(torch.stack(cross_entropies).mean()), "self": float(torch.stack(divergences).mean())}


@pytest.mark.parametrize("operator", ["dart", "fastv", "random", "pyramiddrop"])
@pytest.mark.parametrize("name", ["epic-tcd", "epic-lcd"])
def test_every_operator_trains_and_resumes_equal(stage: Any, operator: str, name: str) -> None:
    """A late step under bf16 and gradient checkpointing: finite, the teacher apart from the student; twice the same numbers."""
    layer = {"layer": 1} if name == "epic-tcd" else {"lowest_layer": 1}
    results = []
    for _ in range(2):
        trainer, batches = stage(name, {"operator": operator, **layer}, bf16=True, gradient_checkpointing=True)
        trainer.model.train()
        results.append(trainer.step(9, batches))
    assert math.isfinite(results[0].loss) and results[0].terms["self"] > 1e-4 and results[0].grad_norm > 0
    assert (results[0].loss, results[0].grad_norm) == (results[1].loss, results[1].grad_norm)


def test_the_teaching_pass_has_no_gradient(stage: Any) -> None:
    """At λ = 1 with nothing removed by either pass, the KL and its gradient vanish; hooks are gone afterwards."""
    trainer, batches = stage("epic-tcd", {"layer": 2, "kd_weight": 1.0})
    result = trainer.step(9, batches)
    assert abs(result.loss) < 1e-6 and result.grad_norm < 1e-4
    assert not any(one._forward_pre_hooks for one in trainer.model.modules())


def test_the_asking_row_predicts_the_first_response_token(stage: Any, tiny_student: Path) -> None:
    _, batches = stage("epic-tcd", {"layer": 1})
    batch = batches[0].batch
    starts = torch.tensor([0, *batch.counts["response"]]).cumsum(0)[:-1]
    following = batch.inputs["input_ids"].gather(1, asking_rows(batch)[:, :1] + 1)[:, 0]
    assert torch.equal(following, batch.labels[starts])
    model, _ = load_student(str(tiny_student), "sdpa")
    with pytest.raises(AssertionError, match="may be removed"):
        RowForward(model)(batch, ["vision"], Pruning("random", 1, removed=0.5))


def test_a_removed_token_that_predicts_is_named_and_never_read_as_another(stage: Any) -> None:
    """As where an image stands inside an answer: its last vision token predicts the next word, and is not the one that asks."""
    trainer, (first, *_) = stage("epic-tcd", {"layer": 1, "operator": "fastv"})
    batch = first.batch
    vision = batch.rows["vision"].split(list(batch.counts["vision"]))
    sample = next(number for number, rows in enumerate(vision) if len(rows))
    answers = list(batch.rows["response"].split(list(batch.counts["response"])))
    counts = list(batch.counts["response"])
    answers[sample] = torch.cat([answers[sample][:1], vision[sample][:-1]])
    counts[sample] = len(answers[sample])
    batch = replace(
        batch,
        rows={**batch.rows, "response": torch.cat(answers)},
        counts={**batch.counts, "response": tuple(counts)},
    )
    with pytest.raises(KdcliError, match=f"row {batch.keys[sample]}: a vision token that predicts"):
        trainer.model(batch, ("response",), Pruning("fastv", layer=1, keep=4))
