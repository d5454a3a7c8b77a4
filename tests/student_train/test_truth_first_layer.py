"""Align-KD and LLaVADI: loss and gradients, from the cache by the product's own path, against both whole models in float64.

The reference takes eager attention of the whole model and the projector's own outputs, row by row, and writes the formulas down anew.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from student_train.losses.first_layer import attention_mse, looked_at
from student_train.methods import create_method
from teacher_cache.errors import CompatibilityError, KdcliError
from tests.close import assert_all_close
from tests.exhaustive import of_all

ROWS = 35
EVERYTHING = {"parts": ("caption", "sft", "talk"), "per_device_train_batch_size": ROWS, "max_grad_norm": 0.0}
FIELDS = ("response_hidden", "vision_hidden", "attention", "vision_features")
STEP = 0.05


def load(folder: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()


class Said:
    """A whole model over a micro-batch, one padded forward: logits and hidden states of rows, and per sample its first layer."""

    def __init__(self, model: Any, batch: Any, length: int, text_kind: str = "text"):
        inputs = {name: one.double() if one.is_floating_point() else one for name, one in batch.inputs.items()}
        out = model(**inputs, use_cache=False, output_attentions=True, output_hidden_states=True)
        states = model.model(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)
        rows = batch.rows
        self.logits = out.logits.flatten(0, 1)[rows["response"]][:, :length]
        self.hidden = {kind: states[rows[kind]] for kind in ("response", "vision")}
        self.samples = []
        width = batch.inputs["input_ids"].shape[1]
        text, vision = (rows[kind].split(list(batch.counts[kind])) for kind in (text_kind, "vision"))
        for number, (words, places) in enumerate(zip(text, vision)):
            words, places = words % width, places % width
            seen = words[words > places.min()] if len(places) else words[:0]
            maps = out.attentions[0][number][:, seen][:, :, places]
            self.samples.append((maps, out.hidden_states[0][number, places]))


def as_stored(maps: torch.Tensor) -> torch.Tensor:
    """What one byte on a scale of logarithms makes of probabilities, zeros left out."""
    return torch.where(maps > 3e-6, torch.exp(-STEP * torch.round(-maps.log() / STEP)), 0.0)


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p * (p / q).log()).sum(1).mean()


def align_kd(teacher: Said, student: Said, maps: Any, top_k: int, each: bool) -> dict[str, torch.Tensor]:
    """Per term, the mean over samples with an image. each: heads one by one, else their means."""
    vis, focus, att = [], [], []
    for (their_maps, theirs), (our_maps, ours) in zip(teacher.samples, student.samples):
        if not len(theirs):
            continue
        stored = as_stored(their_maps)
        mapped = maps.features(theirs.bfloat16().double())
        vis.append(((mapped - ours) ** 2).mean())
        best = stored.mean(0).sum(0).topk(top_k).indices
        focus.append(((mapped[best] - ours[best]) ** 2).mean())
        difference = stored - our_maps if each else stored.mean(0) - our_maps.mean(0)
        att.append((difference**2).mean())
    return {name: torch.stack(values).mean() for name, values in (("vis", vis), ("focus", focus), ("att", att))}


def llavadi(teacher: Said, student: Said, maps: Any, kind: str, distance: str) -> torch.Tensor:
    mapped, theirs = maps.hidden(student.hidden[kind]), teacher.hidden[kind]
    if distance == "mse":
        return ((mapped - theirs) ** 2).mean()
    return (1 - (mapped * theirs).sum(1) / (mapped.norm(dim=1) * theirs.norm(dim=1))).mean()


Open = Callable[..., tuple[Any, Any]]


@pytest.fixture
def one_step(open_stage: Open, rich_cache: Any) -> Callable[..., Any]:
    """``one_step(method, knobs, …)`` → (result, gradients, micro-batch, a float64 copy of the untouched maps)."""
    import copy

    def run(method: str, knobs: dict[str, Any], **settings: Any) -> Any:
        trainer, batches_from = open_stage(
            rich_cache(fields=FIELDS), method=method, knobs=knobs, packing=False, **{**EVERYTHING, **settings}
        )
        found: dict[str, torch.Tensor] = {}
        trainer.optimizer.step = lambda: found.update(
            {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
        )
        maps = copy.deepcopy(trainer.model.maps).double()
        step, batches = next(iter(batches_from(0)))
        return trainer.step(step, batches), found, batches[0].batch, maps

    return run


ALIGN = {
    "paper": {},
    "weights": {"alpha": 0.5, "beta": 2.0, "focus": 0.0, "gamma": 50.0, "temperature": 2.0},
    "each head, response": {"gamma": 20.0, "heads": "each", "text": "response"},
    "focus": {"alpha": 0.0, "beta": 0.0, "focus": 3.0, "gamma": 0.0, "top_k": 5},
}


KIND_OF = {"all": "text", "response": "answer"}


@pytest.mark.parametrize("case", of_all(ALIGN, "paper", "each head, response"))
def test_align_kd(one_step: Any, tiny_teacher: Path, tiny_student: Path, teacher_parts: Any, case: str) -> None:
    knobs = ALIGN[case]
    result, found, batch, maps = one_step("align-kd", knobs)
    method: Any = create_method("align-kd", "paper", knobs)
    model, length = load(tiny_student), len(teacher_parts[0].tokenizer)
    with torch.no_grad():
        teacher = Said(load(tiny_teacher), batch, length, KIND_OF[method.text])
    student = Said(model, batch, length, KIND_OF[method.text])
    temperature = method.temperature
    terms = align_kd(teacher, student, maps, method.top_k, method.heads == "each") | {
        "reg": -student_log_probs(model, batch)[torch.arange(len(batch.labels)), batch.labels].mean(),
        "res": kl((teacher.logits / temperature).softmax(1), (student.logits / temperature).softmax(1)),
    }
    weights = {
        "reg": 1.0,
        "res": method.alpha * temperature**2,
        "vis": method.beta,
        "focus": method.focus,
        "att": method.gamma,
    }
    check(result, found, terms, weights, model, maps)


def student_log_probs(model: Any, batch: Any) -> torch.Tensor:
    inputs = {name: one.double() if one.is_floating_point() else one for name, one in batch.inputs.items()}
    return model(**inputs, use_cache=False).logits.flatten(0, 1)[batch.rows["response"]].log_softmax(1)


LLAVADI = {
    "paper": {},
    "cosine, linear": {"distance": "cosine", "map": "linear", "alpha": 0.0, "beta": 3.0},
    "vision too, T=2": {"vision": 0.5, "temperature": 2.0, "alpha": 0.5},
    "standardised": {"norm_logits": True, "alpha": 5.0},
    "standardised, T=2": {"norm_logits": True, "temperature": 2.0},
}


def normed(logits: torch.Tensor) -> torch.Tensor:
    """LLaVADI's ``norm_logits``: each row's deviation is that of torch, over V − 1."""
    return (logits - logits.mean(dim=-1, keepdim=True)) / (1e-7 + logits.std(dim=-1, keepdim=True))


@pytest.mark.parametrize("case", of_all(LLAVADI, "paper", "standardised, T=2"))
def test_llavadi(one_step: Any, tiny_teacher: Path, tiny_student: Path, teacher_parts: Any, case: str) -> None:
    knobs = LLAVADI[case]
    result, found, batch, maps = one_step("llavadi", knobs)
    method: Any = create_method("llavadi", "paper", knobs)
    model, length = load(tiny_student), len(teacher_parts[0].tokenizer)
    with torch.no_grad():
        teacher = Said(load(tiny_teacher), batch, length)
    student = Said(model, batch, length)
    temperature = method.temperature
    sides = [normed(one.logits) if method.norm_logits else one.logits for one in (teacher, student)]
    terms = {
        "reg": -student_log_probs(model, batch)[torch.arange(len(batch.labels)), batch.labels].mean(),
        "res": kl(*((one / temperature).softmax(1) for one in sides)),
        "emb": llavadi(teacher, student, maps, "response", method.distance),
        "emb_vis": llavadi(teacher, student, maps, "vision", method.distance),
    }
    weights = {"reg": 1.0, "res": method.alpha * temperature**2, "emb": method.beta, "emb_vis": method.vision}
    check(result, found, terms, weights, model, maps)


def check(result: Any, found: Any, terms: Any, weights: dict[str, float], model: Any, maps: Any) -> None:
    """Loss, every term and every gradient, the maps' too."""
    used = {name: weight for name, weight in weights.items() if weight}
    assert set(result.terms) == set(used)
    for name in used:
        assert result.terms[name] == pytest.approx(terms[name].item(), rel=1e-4), name
    expected = sum(weight * terms[name] for name, weight in used.items())
    assert result.loss == pytest.approx(expected.item(), rel=5e-5)
    expected.backward()
    wide = {f"model.{name}": p.grad for name, p in model.named_parameters()}
    wide |= {f"maps.{name}": p.grad for name, p in maps.named_parameters()}
    scale = max(float(one.abs().max()) for one in found.values())
    assert any(name.startswith("maps.") for name in found)
    for name, one in found.items():
        torch.testing.assert_close(one.double(), wide[name], rtol=3e-3, atol=5e-6 * scale, msg=name)


def test_gradient_checkpointing_changes_nothing(one_step: Any) -> None:
    """The first layer's input is noted in the forward pass only, however often it is run again."""
    plain, found, *_ = one_step("align-kd", {"gamma": 30.0})
    again, others, *_ = one_step("align-kd", {"gamma": 30.0}, gradient_checkpointing=True)
    assert again.loss == pytest.approx(plain.loss, rel=1e-5)
    assert_all_close([others[name] for name in found], list(found.values()), 1e-5)


@pytest.mark.parametrize(
    "method, knobs, says",
    [
        ("align-kd", {"heads": "some"}, "heads must be mean or each, got 'some'"),
        ("align-kd", {"text": "prompt"}, "text must be all or response"),
        ("align-kd", {"top_k": 0}, "top_k must be at least 1"),
        ("align-kd", {"gamma": -1.0}, "the weight of att must be"),
        ("llavadi", {"distance": "l1"}, "distance must be mse or cosine"),
        ("llavadi", {"map": "none"}, "map must be mlp or linear"),
        ("llavadi", {"temperature": 0.0}, "temperature must be above 0"),
    ],
)
def test_knobs_without_meaning_are_refused(method: str, knobs: dict[str, Any], says: str) -> None:
    with pytest.raises(KdcliError, match=f"{method}: .*{says}"):
        create_method(method, "paper", knobs)


def test_weights_of_zero_need_nothing() -> None:
    bare = create_method("align-kd", "paper", dict.fromkeys(("alpha", "beta", "focus", "gamma"), 0.0))
    assert not bare.needs() and set(bare.terms()) == {"reg"}
    bare = create_method("llavadi", "paper", {"alpha": 0.0, "beta": 0.0})
    assert not bare.needs() and set(bare.terms()) == {"reg"}


def test_standardised_logits_need_every_token() -> None:
    """Of a head and its tail nobody knows the mean: refused before the student's weights are read."""
    topk = {"response_topk": {"k": 8}}
    method: Any = create_method("llavadi", "code", {"beta": 0.0})
    assert method.norm_logits and {need.direction for need in method.needs()} == {"reverse"}, "samples would not do"
    with pytest.raises(CompatibilityError, match=r"norm_logits needs every token's logit.*capture response_hidden"):
        method.check_student(None, topk)
    method.check_student(None, {**topk, "response_hidden": {}})
    create_method("llavadi", "paper", {"beta": 0.0}).check_student(None, topk)  # type: ignore[attr-defined]


def test_a_cache_without_the_fields_is_refused_with_the_command(open_stage: Open, tiny_cache_standard: Path) -> None:
    with pytest.raises(CompatibilityError, match=r"needs .*text_vision_attention.* --field attention"):
        open_stage(tiny_cache_standard, method="align-kd")
    with pytest.raises(CompatibilityError, match=r"needs .*response_hidden.*a sketch does not give hidden states back"):
        open_stage(tiny_cache_standard, method="llavadi")


def test_other_grids_are_refused_before_the_first_step(
    open_stage: Open, rich_cache: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests import conftest

    monkeypatch.setattr(conftest, "IMAGE_SIZE", 64)
    monkeypatch.setattr(conftest, "VISION_TOKENS", 16)
    student = conftest.build_folder(tmp_path / "small", text_width=32, vision_width=24, seed=3)
    with pytest.raises(CompatibilityError, match="vision grids differ"):
        open_stage(rich_cache(fields=FIELDS), method="align-kd", student=student, parts=("caption",))


def test_losses_on_maps_alone() -> None:
    """Other counts of heads are compared by their means only; an image behind all text costs nothing; equals stand in order."""
    many, few = torch.rand(4, 3, 5), torch.rand(2, 3, 5)
    assert float(attention_mse(many, few, "mean")) == pytest.approx(float(((many.mean(0) - few.mean(0)) ** 2).mean()))
    with pytest.raises(CompatibilityError, match="stored with 4 heads, the student has 2: use --set heads=mean"):
        attention_mse(many, few, "each")
    assert float(attention_mse(many[:, :0], few[:, :0], "mean")) == 0.0
    paid = torch.tensor([[[0.1, 0.3, 0.0, 0.3]], [[0.1, 0.1, 0.0, 0.1]]])
    assert looked_at(paid, 3).tolist() == [1, 3, 0] and looked_at(paid, 9).tolist() == [1, 3, 0, 2]
