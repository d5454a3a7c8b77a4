"""Every baseline's loss and gradients, from the cache by the product's own path, against the live teacher in float64.

The reference runs both whole models over the micro-batch and writes the papers' formulas down over full probabilities; how rows are
rendered and found is ``test_truth``'s matter.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from student_train.methods import create_method, method_modules
from student_train.methods.soft_targets import SoftTargets, square_note
from teacher_cache.errors import KdcliError
from tests.exhaustive import of_all

ROWS = 35
EVERYTHING = {"parts": ("caption", "sft", "talk"), "per_device_train_batch_size": ROWS}
Probabilities = torch.Tensor


def kl(p: Probabilities, q: Probabilities) -> torch.Tensor:
    return (p * (p / q).log()).sum(1).mean()


def jsd(t: Probabilities, s: Probabilities, beta: float) -> torch.Tensor:
    middle = beta * t + (1 - beta) * s
    return beta * kl(t, middle) + (1 - beta) * kl(s, middle)


CASES: dict[str, tuple[str, dict[str, Any], float, Callable[..., torch.Tensor]]] = {
    # name: method, knobs, weight of the cross-entropy, the rest of the loss of (p_t, p_s) at the knobs' temperature
    "kd": ("kd", {}, 1.0, kl),
    "kd, T=2": ("kd", {"temperature": 2.0, "alpha": 0.5}, 1.0, lambda t, s: 0.5 * 4.0 * kl(t, s)),
    "kd, T=2, no T²": ("kd", {"temperature": 2.0, "temperature_squared": False, "reg": 0.5}, 0.5, kl),
    "minillm": ("minillm-offline", {}, 0.0, lambda t, s: kl(s, t)),
    "minillm, T=2": ("minillm-offline", {"temperature": 2.0, "reg": 1.0}, 1.0, lambda t, s: 4.0 * kl(s, t)),
    "skew": ("distillm-offline", {}, 0.0, lambda t, s: kl(t, 0.1 * t + 0.9 * s)),
    "reverse skew": ("distillm-offline", {"direction": "reverse"}, 0.0, lambda t, s: kl(s, 0.9 * t + 0.1 * s)),
    "skew 0.4": ("distillm-offline", {"skew": 0.4, "alpha": 3.0}, 0.0, lambda t, s: 3.0 * kl(t, 0.4 * t + 0.6 * s)),
    "jsd": ("jsd", {}, 0.0, lambda t, s: jsd(t, s, 0.5)),
    "jsd 0.1": ("jsd", {"beta": 0.1, "temperature": 2.0}, 0.0, lambda t, s: 4.0 * jsd(t, s, 0.1)),
}


def live_logits(model: Any, batch: Any) -> torch.Tensor:
    """float64 ``[R, V]`` of all response rows of a batch."""
    inputs = {name: one.double() if one.is_floating_point() else one for name, one in batch.inputs.items()}
    return model(**inputs, use_cache=False).logits.flatten(0, 1)[batch.rows["response"]]


def load(folder: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64).eval()


@pytest.mark.parametrize("case", of_all(CASES, "kd, T=2", "minillm", "reverse skew", "jsd 0.1"))
def test_loss_and_gradients_equal_the_live_teacher(
    open_stage: Callable[..., tuple[Any, Any]],
    rich_cache: Any,
    tiny_teacher: Path,
    tiny_student: Path,
    teacher_parts: Any,
    case: str,
) -> None:
    method, knobs, reg, loss_of = CASES[case]
    trainer, batches_from = open_stage(rich_cache(), method=method, knobs=knobs, max_grad_norm=0.0, **EVERYTHING)
    found: dict[str, torch.Tensor] = {}
    trainer.optimizer.step = lambda: found.update(
        {
            name.removeprefix("model."): p.grad.clone()
            for name, p in trainer.model.named_parameters()
            if p.grad is not None
        }
    )
    step, (micro_batch,) = next(iter(batches_from(0)))
    result = trainer.step(step, [micro_batch])

    student, temperature, length = load(tiny_student), knobs.get("temperature", 1.0), len(teacher_parts[0].tokenizer)
    with torch.no_grad():
        p_t = (live_logits(load(tiny_teacher), micro_batch.batch)[:, :length] / temperature).softmax(1)
    logits = live_logits(student, micro_batch.batch)
    entropy = -logits.log_softmax(1)[torch.arange(len(logits)), micro_batch.batch.labels].mean()
    expected = reg * entropy + loss_of(p_t, (logits[:, :length] / temperature).softmax(1))
    expected.backward()

    assert result.loss == pytest.approx(expected.item(), rel=2e-5)
    assert set(result.terms) == ({"reg", "res"} if reg else {"res"})
    wide = {name: p.grad for name, p in student.named_parameters()}
    scale = max(float(one.abs().max()) for one in found.values())
    assert found
    for name, one in found.items():
        torch.testing.assert_close(one.double(), wide[name], rtol=2e-3, atol=2e-6 * scale, msg=name)


@pytest.mark.parametrize(
    "method, knobs, says",
    [
        ("kd", {"temperature": 0.0}, "temperature must be above 0"),
        ("kd", {"alpha": 0.0, "reg": 0.0}, "every weight is 0"),
        ("minillm-offline", {"alpha": -1.0}, "the weight of res must be a number from 0 on, got -1"),
        ("llava-kd", {"reg": float("nan")}, "the weight of reg"),
        ("distillm-offline", {"direction": "both"}, "forward or reverse"),
        ("distillm-offline", {"skew": 0.0}, r"skew must be in \(0, 1\)"),
        ("jsd", {"beta": 1.0}, r"beta must be in \(0, 1\).*minillm-offline"),
    ],
)
def test_knobs_without_meaning_are_refused(method: str, knobs: dict[str, Any], says: str) -> None:
    with pytest.raises(KdcliError, match=f"{method}: .*{says}"):
        create_method(method, "paper", knobs)


def test_every_divergence_is_multiplied_by_the_square_of_its_temperature() -> None:
    """By one rule in every method that has a temperature; at T = 1 nothing changes, and what follows no temperature never does."""
    for name in method_modules():
        plain = create_method(name)
        if not isinstance(plain, SoftTargets):
            continue
        cold, warm = plain.terms(), create_method(name, knobs={"temperature": 3.0}).terms()
        former = create_method(name, knobs={"temperature": 3.0, "temperature_squared": False}).terms()
        softened = {
            term for term in cold if term in ("res", "self", "rld", "vsd") or (name, term) == ("llava-kd", "vis")
        }
        assert softened, name
        for term, one in cold.items():
            assert warm[term].weight == pytest.approx(one.weight * (9.0 if term in softened else 1.0)), (name, term)
            assert former[term].weight == one.weight
    assert "T² = 4" in square_note("em-kd", create_method("em-kd", knobs={"temperature": 2.0}))
    assert not square_note("em-kd", create_method("em-kd"))


@pytest.mark.parametrize("method", ["kd", "minillm-offline", "distillm-offline", "jsd"])
def test_a_weight_of_zero_needs_no_teacher(method: str) -> None:
    plain = create_method(method, "paper", {"alpha": 0.0, "reg": 1.0})
    assert not plain.needs() and set(plain.terms()) == {"reg"}
