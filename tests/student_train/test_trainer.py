"""One optimizer step: accumulation, precision, checkpointing of activations, clipping, and what must stop it."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from student_train.config import TrainSettings
from student_train.term_gradients import term_gradients
from teacher_cache.errors import KdcliError
from tests.close import assert_all_close

SELECT = {"reg": "unless-contradicted:0.013", "res": "confidence", "vis": "confidence/mean", "rel": "confidence/least"}
STEP = {"parts": ("caption", "sft"), "max_steps": 2, "select": SELECT, "schedule": {"vis": "linear:0.5:1"}}


def after_step(opened: tuple[Any, Any]) -> tuple[Any, dict[str, torch.Tensor]]:
    """(result, weights) after one step of plain gradient descent: Adam would blow rounding up where a gradient is nearly 0."""
    trainer, batches_from = opened
    trainer.optimizer = torch.optim.SGD(trainer.parameters)
    trainer.settings = trainer.settings.__class__(**{**vars(trainer.settings), "learning_rate": 0.1})
    step, batches = next(iter(batches_from(0)))
    result = trainer.step(step, batches)
    return result, {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.fixture
def whole_batch(open_stage: Callable[..., Any], tiny_cache: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """One step over 8 rows at once."""
    return after_step(open_stage(tiny_cache, per_device_train_batch_size=8, **STEP))


@pytest.mark.parametrize("size, count", [(1, 8), (3, 3)])
def test_micro_batches_make_the_step_of_the_whole_batch(
    open_stage: Callable[..., Any], tiny_cache: Path, whole_batch: Any, size: int, count: int
) -> None:
    """8 rows as 8 × 1, or 9 as 3 × 3 against 9 at once: text-only rows, long and short ones, each with its own padding."""
    sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": count}
    ours, weights = after_step(open_stage(tiny_cache, **sizes, **STEP))
    theirs, expected = whole_batch
    if size * count != 8:
        theirs, expected = after_step(open_stage(tiny_cache, per_device_train_batch_size=size * count, **STEP))
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
    assert ours.terms == pytest.approx(theirs.terms, rel=1e-5)
    assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-5)
    assert ours.tokens == theirs.tokens
    assert_all_close(list(weights.values()), [expected[name] for name in weights], 1e-6)


def test_the_gradients_of_terms_make_up_the_step_s(
    open_stage: Callable[..., Any], tiny_cache: Path, whole_batch: Any
) -> None:
    """|Σ g|² = Σ |g_i||g_j| cos: by passes of single terms as by the whole step, which they leave as it is."""
    trainer, batches_from = open_stage(tiny_cache, per_device_train_batch_size=4, gradient_accumulation_steps=2, **STEP)
    step, batches = next(iter(batches_from(0)))
    logged = term_gradients(trainer, step, batches)
    norms = {name: logged[f"gradient_norm/{name}"] for name in trainer.terms}
    total = sum(norm**2 for norm in norms.values())
    for one, other in combinations(norms, 2):
        total += 2 * norms[one] * norms[other] * logged[f"gradient_cosine/{one}:{other}"]
    assert min(norms.values()) > 0 and len(logged) == 4 + 6
    assert math.sqrt(total) == pytest.approx(whole_batch[0].grad_norm, rel=1e-4)
    result = after_step((trainer, batches_from))[0]
    assert result.loss == pytest.approx(whole_batch[0].loss, rel=1e-5) and result.weights == {"vis": 0.5}


def test_gradient_checkpointing_changes_nothing(
    open_stage: Callable[..., Any], tiny_cache: Path, whole_batch: Any
) -> None:
    opened = open_stage(tiny_cache, per_device_train_batch_size=8, gradient_checkpointing=True, **STEP)
    opened[0].model.train()
    result, weights = after_step(opened)
    assert result.loss == pytest.approx(whole_batch[0].loss, rel=1e-5)
    assert_all_close(list(weights.values()), [whole_batch[1][name] for name in weights], 1e-6)


def test_bf16_autocast_stays_near_float32(open_stage: Callable[..., Any], tiny_cache: Path, whole_batch: Any) -> None:
    """Weights stay float32; the hidden states that the losses see are in the compute dtype."""
    trainer, batches_from = open_stage(tiny_cache, per_device_train_batch_size=8, bf16=True, **STEP)
    seen: list[torch.dtype] = []
    trainer.model.register_forward_hook(lambda module, given, out: seen.extend(one.dtype for one in out.values()))
    result, weights = after_step((trainer, batches_from))
    assert set(seen) == {torch.bfloat16}
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    assert result.loss == pytest.approx(whole_batch[0].loss, rel=2e-2)
    assert result.grad_norm == pytest.approx(whole_batch[0].grad_norm, rel=5e-2)


@pytest.mark.parametrize("stage, trained", [("DPT", {"projector"}), ("DFT", {"projector", "language_model"})])
def test_a_stage_trains_its_modules_alone(
    open_stage: Callable[..., Any], tiny_cache: Path, stage: str, trained: set[str]
) -> None:
    from student_train.load_student import module_group

    trainer, batches_from = open_stage(tiny_cache, stage, per_device_train_batch_size=4, max_steps=1)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train(batches_from)
    changed = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert {module_group(name) for name in changed} == trained
    assert all(not p.requires_grad for n, p in trainer.model.named_parameters() if module_group(n) not in trained)


def test_a_text_only_step_of_a_projector_stage_moves_nothing(open_stage: Callable[..., Any], tiny_cache: Path) -> None:
    trainer, batches_from = open_stage(tiny_cache, "DPT", parts=("sft",), per_device_train_batch_size=1)
    text_only = next(each for _, each in batches_from(0) if not each[0].batch.counts["vision"][0])
    before = [p.detach().clone() for p in trainer.parameters]
    result = trainer.step(0, text_only)
    assert result.loss > 0 and result.grad_norm == 0 and result.terms["vis"] == 0 and result.terms["rel"] == 0
    assert all(torch.equal(p, old) for p, old in zip(trainer.parameters, before))


def test_clipping_and_its_absence(open_stage: Callable[..., Any], tiny_cache: Path) -> None:
    """Gradient descent with rate 0.1 moves the weights by 0.1 × the (clipped) norm; 0 means no clipping."""
    for limit, share in ((1e-3, 1e-3), (0.0, None)):
        trainer, batches_from = open_stage(tiny_cache, per_device_train_batch_size=4, max_grad_norm=limit, **STEP)
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
        result, weights = after_step((trainer, batches_from))
        moved = torch.stack([(weights[name] - before[name]).norm() for name in weights]).norm()
        rate = result.learning_rate
        assert float(moved) == pytest.approx(rate * (share or result.grad_norm), rel=1e-2)


def test_a_broken_gradient_never_reaches_weights_or_checkpoints(
    open_stage: Callable[..., Any], tiny_cache: Path
) -> None:
    trainer, batches_from = open_stage(tiny_cache, per_device_train_batch_size=4, save_steps=1, **STEP)
    head = trainer.model.head
    head.register_hook(lambda gradient: gradient * float("nan"))
    before = head.detach().clone()
    with pytest.raises(KdcliError, match="gradient norm is nan at step 0"):
        trainer.train(batches_from)
    assert torch.equal(head, before)
    assert not list(trainer.folder.glob("checkpoints/*"))


def test_learning_rate_warms_up_and_falls_as_a_cosine(open_stage: Callable[..., Any], tiny_cache: Path) -> None:
    trainer, _ = open_stage(tiny_cache, max_steps=200, learning_rate=1.0, warmup_ratio=0.03)
    rates = [trainer.learning_rate(step) for step in range(200)]
    assert rates[:6] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1.0])
    assert rates[6] == 1.0 and rates[103] == pytest.approx(0.5) and 0 < rates[-1] < 1e-3
    assert rates[6:] == sorted(rates[6:], reverse=True)


def test_fields_of_two_teachers_are_read_with_their_own_heads(
    first_step: Callable[..., Any],
    tiny_cache: Path,
    tiny_student: Path,
    make_request: Callable[..., Any],
    copy_of: Callable[[Path], Path],
) -> None:
    """Vision states of another teacher, added to the cache later: the response term does not move, the vision terms do."""
    import shutil

    from pipelines.capture.cache_teacher import capture

    settings = {"per_device_train_batch_size": 4, "max_steps": 1}
    first = first_step(tiny_cache, **settings)
    mixed = copy_of(tiny_cache)
    for name in ("vision_hidden", "relation"):
        shutil.rmtree(mixed / "fields" / name)
    capture(make_request(mixed, teacher=tiny_student, fields=("vision_hidden",)))
    result = first_step(mixed, **settings)
    assert result.terms["res"] == first.terms["res"] and result.terms["reg"] == first.terms["reg"]
    # the second teacher is the student itself
    assert result.terms["vis"] == pytest.approx(0.0, abs=1e-5) and result.terms["rel"] == pytest.approx(0.0, abs=1e-5)


def test_the_vision_tower_trains_at_a_rate_of_its_own(open_stage: Callable[..., Any], tiny_cache: Path) -> None:
    trainer, batches_from = open_stage(
        tiny_cache, method="sft", stage="SFT", parts=("sft",), learning_rate=1e-2, vision_tower_learning_rate=1e-3
    )
    tower = {n: p.clone() for n, p in trainer.model.named_parameters() if "vision_tower" in n and p.requires_grad}
    assert tower
    step, batches = next(iter(batches_from(0)))
    trainer.step(step, batches)
    rest, slow = trainer.optimizer.param_groups
    assert slow["lr"] == pytest.approx(rest["lr"] / 10) and len(slow["params"]) == len(tower)
    assert any(not torch.equal(p, tower[n]) for n, p in trainer.model.named_parameters() if n in tower)
    frozen, _ = open_stage(tiny_cache, method="sft", stage="SFT", parts=("sft",))
    assert len(frozen.optimizer.param_groups) == 1


@pytest.mark.parametrize("steps, ratio", [(1, 0.03), (33, 0.03), (100, 0.1), (5197, 0.03), (7, 0.0)])
def test_the_rate_is_that_of_transformers_but_for_the_first_warm_up_step(steps: int, ratio: float) -> None:
    """Theirs begins at 0; ours is one step ahead through the warm-up, and equal from its end on."""
    from types import SimpleNamespace

    from transformers import get_cosine_schedule_with_warmup

    from student_train.trainer import Trainer

    warm_up = math.ceil(steps * ratio)  # as transformers' TrainingArguments count them
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2e-5)
    schedule = get_cosine_schedule_with_warmup(optimizer, warm_up, steps)
    (theirs,) = schedule.lr_lambdas
    one = SimpleNamespace(settings=TrainSettings(learning_rate=2e-5, warmup_ratio=ratio), total_steps=steps)
    for step in range(steps):
        ours = Trainer.learning_rate(one, step)  # type: ignore[arg-type]
        assert ours == pytest.approx(2e-5 * theirs(step + (step < warm_up)), rel=1e-12)
    assert theirs(0) == (0.0 if warm_up else 1.0) and Trainer.learning_rate(one, 0) > 0  # type: ignore[arg-type]


def test_a_training_without_memory(open_stage: Callable[..., Any], tiny_cache: Path) -> None:
    trainer, batches_from = open_stage(
        tiny_cache, parts=("caption", "sft"), max_steps=2, per_device_train_batch_size=4, packing=False
    )
    trainer.model.model.register_forward_pre_hook(lambda *_: torch.empty(1 << 50))
    with pytest.raises(KdcliError) as caught:
        trainer.train(batches_from)
    said = str(caught.value)
    assert len(said.splitlines()) == 1
    for word in (
        "out of memory at step 0",
        "micro-batches of up to 4 rows",
        "--per-device-train-batch-size",
        "checkpoint",
    ):
        assert word in said, said
