"""Every method's step on a GPU is the step on the CPU; skipped where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

STEP = {"parts": ("caption", "sft"), "per_device_train_batch_size": 8, "max_steps": 2}
FIELDS = ("response_hidden", "vision_hidden", "affinity", "attention", "vision_features")
CASES: dict[str, dict[str, Any]] = {
    "sft": {"method": "sft", "stage": "SFT"},
    "kd": {"method": "kd", "knobs": {"temperature": 2.0}},
    "minillm-offline": {"method": "minillm-offline"},
    "distillm-offline": {"method": "distillm-offline"},
    "jsd": {"method": "jsd"},
    "llava-kd": {"method": "llava-kd"},
    "em-kd": {"method": "em-kd"},
    "em-kd, sampled columns": {"method": "em-kd", "knobs": {"columns": 10**6}},
    "em-kd, hidden states": {"method": "em-kd", "knobs": {"matching": "hungarian-hidden", "target": "hidden"}},
    "em-kd, pooled": {"method": "em-kd", "knobs": {"matching": "pool"}},
    "epic-tcd": {"method": "epic-tcd", "knobs": {"layer": 1, "operator": "random"}},
    "epic-lcd": {"method": "epic-lcd", "knobs": {"lowest_layer": 1, "operator": "dart"}},
    "align-kd": {"method": "align-kd"},
    "llavadi": {"method": "llavadi"},
}


def gradients(opened: tuple[Any, Any]) -> tuple[Any, dict[str, torch.Tensor]]:
    """(result, gradients on the CPU) of one step, unclipped."""
    trainer, batches_from = opened
    found: dict[str, torch.Tensor] = {}
    trainer.optimizer.step = lambda: found.update(
        {name: p.grad.cpu() for name, p in trainer.model.named_parameters() if p.grad is not None}
    )
    step, batches = next(iter(batches_from(0)))
    return trainer.step(step, batches), found


@pytest.fixture
def both_sides(
    open_stage: Callable[..., Any], rich_cache: Any, coarse_student: Path, deep_student: Path, gpu: str
) -> Callable[..., Any]:
    """``both_sides(case, store=None, **settings)`` → (result, gradients) on the CPU and on the GPU, the latter with ``settings``."""

    def run(case: str, store: Path | None = None, **settings: Any) -> Any:
        students = {"em-kd": coarse_student, "epic-tcd": deep_student, "epic-lcd": deep_student}
        chosen = CASES[case]
        given = {"student": students[chosen["method"]]} if chosen["method"] in students else {}
        arguments = {**STEP, **chosen, **given, "max_grad_norm": 0.0}
        cache = store or rich_cache(fields=FIELDS)
        ours = gradients(open_stage(cache, **arguments))
        return ours, gradients(open_stage(cache, **arguments, device=gpu, **settings))

    return run


def check(ours: Any, theirs: Any, value: float, gradient: float, least: float = 1e-7) -> None:
    (result, found), (expected, wanted) = theirs, ours
    assert result.loss == pytest.approx(expected.loss, rel=value)
    assert result.terms == pytest.approx(expected.terms, rel=value, abs=least)
    assert result.grad_norm == pytest.approx(expected.grad_norm, rel=gradient)
    assert found.keys() == wanted.keys()
    square = sum(float((found[name] - wanted[name]).double().square().sum()) for name in wanted)
    assert square**0.5 <= gradient * expected.grad_norm


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_that_of_the_cpu(both_sides: Callable[..., Any], case: str) -> None:
    """float32; convolutions of the vision tower may run in TF32, whose products have ten bits."""
    check(*both_sides(case), value=1e-3, gradient=5e-3)


@pytest.mark.parametrize("case", ["llava-kd", "em-kd", "kd"])
def test_coded_fields_too(both_sides: Callable[..., Any], tiny_cache_standard: Path, case: str) -> None:
    """An untrained student's patches are nearly alike: a rounding may match two of them the other way round."""
    near = {"value": 2e-2, "gradient": 5e-2} if case == "em-kd" else {"value": 1e-3, "gradient": 5e-3}
    check(*both_sides(case, tiny_cache_standard), **near)


@pytest.mark.parametrize("case", ["sft", "llava-kd", "em-kd, pooled", "epic-tcd", "align-kd"])
def test_bf16_stays_near(both_sides: Callable[..., Any], case: str) -> None:
    check(*both_sides(case, bf16=True), value=3e-2, gradient=1e-1, least=1e-4)


def test_gradient_checkpointing_changes_nothing(both_sides: Callable[..., Any]) -> None:
    check(*both_sides("llava-kd", gradient_checkpointing=True), value=1e-3, gradient=5e-3)
