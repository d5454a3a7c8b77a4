"""EM-KD's loss and gradients, from the cache by the product's own path, against the live teacher in float64.

The student has a vision encoder of its own: 9 vision tokens an image beside the teacher's 36. The reference runs both whole models row
by row, matches with scipy on a dense cost, and writes the paper's formulas down over full probabilities.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch.nn.functional import cosine_similarity

from student_train.methods import create_method
from teacher_cache.errors import CompatibilityError, KdcliError
from tests.contracts.dense_reference import teacher_batch
from tests.exhaustive import of_all

ROWS = 35
EVERYTHING = {"parts": ("caption", "sft", "talk"), "per_device_train_batch_size": ROWS}
IMAGE_TOKENS = {"teacher": 36, "student": 9}
WEIGHTS = {"sup": 0.5, "rld": 0.5, "vsd": 0.25, "vlad": 25.0}


@dataclass(frozen=True)
class Side:
    """One row as one model says it, float64: logits over the shared columns, the response's over all, and hidden states."""

    vision: torch.Tensor
    response: torch.Tensor
    whole: torch.Tensor
    hidden: torch.Tensor
    text: torch.Tensor


def load(folder: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64).eval()


def say(model: Any, batch: Any, length: int) -> list[Side]:
    """Every row of a batch, with the first ``length`` columns of the head."""
    inputs = {name: one.double() if one.is_floating_point() else one for name, one in batch.inputs.items()}
    states = model.model(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)
    split = {kind: states[at].split(batch.counts[kind]) for kind, at in batch.rows.items()}
    whole = model.get_output_embeddings().weight
    head = whole[:length]
    return [
        Side(v @ head.T, r @ head.T, r @ whole.T, v, t)
        for v, r, t in zip(split["vision"], split["response"], split["text"])
    ]


def per_image(cost: torch.Tensor) -> list[int]:
    """scipy's assignment of every image by itself: teacher row of each student row."""
    pairs: list[int] = []
    many, few = IMAGE_TOKENS["teacher"], IMAGE_TOKENS["student"]
    for image in range(cost.shape[1] // few):
        block = cost[image * many : (image + 1) * many, image * few : (image + 1) * few]
        rows, columns = linear_sum_assignment(block.detach().numpy())
        pairs += [image * many + int(rows[list(columns).index(j)]) for j in range(few)]
    return pairs


def pooling(images: int) -> torch.Tensor:
    """``[N_s, N_t]``: each 3 × 3 student token is the mean of its 2 × 2 of the teacher's 6 × 6."""
    weights = torch.zeros(9 * images, 36 * images, dtype=torch.float64)
    for image in range(images):
        for row in range(6):
            for column in range(6):
                weights[image * 9 + row // 2 * 3 + column // 2, image * 36 + row * 6 + column] = 0.25
    return weights


def divergence(teacher: torch.Tensor, student: torch.Tensor, kind: str) -> torch.Tensor:
    p_t, p_s = teacher.softmax(1), student.softmax(1)
    middle = (p_t + p_s) / 2

    def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return (p * (p / q).log()).sum(1)

    return {"reverse": kl(p_s, p_t), "forward": kl(p_t, p_s), "jsd": (kl(p_t, middle) + kl(p_s, middle)) / 2}[kind]


def smooth_l1(difference: torch.Tensor) -> torch.Tensor:
    size = difference.abs()
    return torch.where(size < 1, size.square() / 2, size - 0.5).mean()


def reference(
    teacher: list[Side],
    student: list[Side],
    batch: Any,
    masks: list[tuple[torch.Tensor, torch.Tensor]],
    knobs: Mapping[str, Any],
    linear: Any,
) -> dict[str, torch.Tensor]:
    """The paper's terms, averaged over rows (VLAD: over samples with an image). masks: response tokens in each side's text."""
    matching, target = knobs.get("matching", "hungarian-logits"), knobs.get("target", "logits")
    kind = knobs.get("divergence", "reverse")
    rld, vsd, vlad, mapped = [], [], [], []
    for t, s, (theirs, ours) in zip(teacher, student, masks):
        rld.append(divergence(t.response, s.response, kind))
        if not len(s.vision):
            continue
        if matching == "pool":
            weights = pooling(len(s.vision) // 9)
        else:
            left, right = (t.vision, s.vision) if matching == "hungarian-logits" else (t.hidden, linear(s.hidden))
            if knobs.get("cost") == "probs":
                left, right = left.softmax(1), right.softmax(1)
            cost = (left[:, None] - right[None]).abs().sum(2)
            weights = torch.eye(len(t.vision), dtype=torch.float64)[per_image(cost)]
        text_t, text_s = (t.text, s.text) if knobs.get("text") == "all" else (t.text[theirs], s.text[ours])
        cosines = cosine_similarity(s.hidden[:, None], text_s[None], dim=2)
        aims = weights @ cosine_similarity(t.hidden[:, None], text_t[None], dim=2)
        vlad.append(smooth_l1(aims - cosines))
        if linear is not None:
            rows = s.hidden if target == "hidden" else s.hidden.detach()
            mapped.append((linear(rows) - weights @ t.hidden).square().mean(1))
        vsd.append(divergence(weights @ t.vision, s.vision, kind) if target == "logits" else mapped[-1])
    entropy = -torch.cat([s.whole for s in student]).log_softmax(1)
    found = {
        "sup": entropy[torch.arange(len(batch.labels)), batch.labels].mean(),
        "rld": torch.cat(rld).mean(),
        "vsd": torch.cat(vsd).mean(),
        "vlad": torch.stack(vlad).mean(),
    }
    if not knobs.get("gamma", 25.0):
        del found["vlad"]
    if matching == "hungarian-hidden" and target == "logits":
        found["map"] = torch.cat(mapped).mean()
    return found


CASES: dict[str, dict[str, Any]] = {
    "paper": {},
    "all text": {"text": "all"},
    "pool": {"matching": "pool"},
    "without affinities": {"gamma": 0.0},
    "cost on probabilities, forward": {"cost": "probs", "gamma": 0.0, "divergence": "forward"},
    "pool, without affinities, jsd": {"matching": "pool", "gamma": 0.0, "divergence": "jsd"},
    "hidden matching": {"matching": "hungarian-hidden", "gamma": 0.0},
    "hidden target": {"target": "hidden", "gamma": 0.0},
    "hidden both": {"matching": "hungarian-hidden", "target": "hidden", "gamma": 0.0},
    "every column sampled": {"columns": 10**6, "gamma": 0.0},
}

KEPT = "cost on probabilities, forward", "pool, without affinities, jsd", "hidden both"


@pytest.mark.parametrize("case", of_all(CASES, "paper", "all text", *KEPT))
def test_loss_and_gradients_equal_the_live_teacher(
    open_stage: Callable[..., tuple[Any, Any]],
    rich_cache: Any,
    tiny_teacher: Path,
    coarse_student: Path,
    teacher_parts: Any,
    case: str,
) -> None:
    knobs = CASES[case]
    trainer, batches_from = open_stage(
        rich_cache(), method="em-kd", knobs=knobs, student=coarse_student, max_grad_norm=0.0, **EVERYTHING
    )
    found: dict[str, torch.Tensor] = {}
    trainer.optimizer.step = lambda: found.update(
        {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    )
    step, (micro_batch,) = next(iter(batches_from(0)))
    result = trainer.step(step, [micro_batch])

    teacher, student, length = load(tiny_teacher), load(coarse_student), len(teacher_parts[0].tokenizer)
    linear = None
    if "vision" in trainer.model.maps:
        linear = torch.nn.Linear(32, 48).double()
        linear.load_state_dict(trainer.model.maps["vision"].state_dict())
    batch = micro_batch.batch
    with torch.no_grad():
        theirs = teacher_batch(rich_cache(), EVERYTHING["parts"], batch.keys, teacher_parts)
        said = say(teacher, theirs, length)
    masks = [(t.response, s.response) for t, s in zip(micro_batch.text, micro_batch.student_text)]
    terms = reference(said, say(student, batch, length), batch, masks, knobs, linear)
    weights = {**WEIGHTS, "map": 1.0}
    sum(weights[name] * value for name, value in terms.items()).backward()

    assert set(result.terms) == set(terms)
    for name, value in terms.items():
        assert result.terms[name] == pytest.approx(value.item(), rel=1e-4, abs=1e-7), name
    wide = {f"model.{name}": p.grad for name, p in student.named_parameters()}
    wide |= {f"maps.vision.{name}": p.grad for name, p in linear.named_parameters()} if linear is not None else {}
    assert found
    for name, one in found.items():
        error = (one.double() - wide[name]).norm() / wide[name].norm()
        # Cosines are stored in 1/127: what they move is all that differs beyond float32.
        assert error < (2e-3 if "vlad" in terms else 5e-5), name


def test_what_is_left_out_is_not_asked_for() -> None:
    """The paper's ablation: baseline, + VLAD, + VSD, + RLD."""
    rows = {
        "baseline": ({"beta": 0.0, "gamma": 0.0, "rld": False}, {"sup"}),
        "+VLAD": ({"beta": 0.0, "rld": False}, {"sup", "vlad"}),
        "+VSD": ({"rld": False}, {"sup", "vlad", "vsd"}),
        "+RLD": ({}, {"sup", "vlad", "vsd", "rld"}),
    }
    for name, (knobs, terms) in rows.items():
        method = create_method("em-kd", "paper", knobs)
        assert set(method.terms()) == terms, name
        assert (method.alignment() is None) == (name == "baseline")  # type: ignore[attr-defined]
    assert not create_method("em-kd", "paper", rows["baseline"][0]).needs()


@pytest.mark.parametrize(
    "knobs, says",
    [
        ({"matching": "greedy"}, "matching must be hungarian-logits or hungarian-hidden or pool"),
        ({"alpha": 0.0}, r"alpha must be in \(0, 1\]"),
        ({"columns": 100, "cost": "probs"}, "columns samples the cost"),
        ({"text": "prompt"}, "text must be response or all"),
        ({"temperature": 0.0}, "temperature"),
        ({"divergence": "backward"}, "divergence must be forward or reverse or jsd, got 'backward'"),
    ],
)
def test_knobs_without_meaning_are_refused(knobs: dict[str, Any], says: str) -> None:
    with pytest.raises(KdcliError, match=f"em-kd: {says}"):
        create_method("em-kd", "paper", knobs)


def test_a_student_with_more_vision_tokens_is_refused_before_the_first_step(
    open_stage: Callable[..., Any], tiny_cache: Path, tmp_path: Path
) -> None:
    from tests.conftest import build_folder

    fine = build_folder(tmp_path / "fine", text_width=32, vision_width=24, seed=4, patch=8)
    with pytest.raises(CompatibilityError, match="144 vision tokens of the student to match with 36 of the teacher"):
        open_stage(tiny_cache, method="em-kd", student=fine)


def test_gradients_are_those_of_any_grouping(
    first_step: Callable[..., Any], rich_cache: Any, coarse_student: Path
) -> None:
    one = first_step(rich_cache(), method="em-kd", student=coarse_student, **EVERYTHING)
    sizes = {"per_device_train_batch_size": 7, "gradient_accumulation_steps": 5}
    many = first_step(rich_cache(), method="em-kd", student=coarse_student, **{**EVERYTHING, **sizes})
    assert many.loss == pytest.approx(one.loss, rel=1e-5) and many.terms == pytest.approx(one.terms, rel=1e-4)
    assert many.grad_norm == pytest.approx(one.grad_norm, rel=1e-4)
