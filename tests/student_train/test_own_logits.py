"""Students whose logits are more than W·h: losses and gradients are those of the whole model's own logits, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from student_train.distributions import DenseTeacher
from student_train.group_costs import column_sampled_costs, manhattan_costs
from student_train.losses.terms import Rows
from student_train.match_groups import MatchGroup
from student_train.methods import Passes
from student_train.student import RowForward
from teacher_cache.errors import CompatibilityError
from teacher_cache.models.head import cap_in_place
from tests.capped_model import CAP, build_capped
from tests.contracts.dense_reference import Dense64, in_float64
from tests.teacher_cache.models.test_head_form import outer


@pytest.fixture(scope="module")
def capped_student(tmp_path_factory: pytest.TempPathFactory, tiny_student: Path) -> Path:
    return build_capped(tmp_path_factory.mktemp("models") / "capped", tiny_student)


@pytest.fixture
def opened(
    open_stage: Callable[..., tuple[Any, Any]], tiny_cache: Path, capped_student: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Any, Any]]:
    """``opened(kind)`` → (trainer of jsd, a micro-batch); kinds: ``cap``, ``scale``, ``odd scale``, ``plain``."""

    def open_(kind: str, **how: Any) -> tuple[Any, Any]:
        from student_train import load_student as loading

        scale = {"scale": 0.25, "odd scale": 1 / 3}.get(kind)
        if scale:
            load = loading.load_student

            def scaled(*arguments: Any) -> tuple[Any, Any]:
                model, processor = load(*arguments)
                return outer(model, after=lambda z: z * scale), processor

            monkeypatch.setattr(loading, "load_student", scaled)
        given = {"student": capped_student} if kind == "cap" else {}
        trainer, batches_from = open_stage(tiny_cache, **{"method": "jsd", "knobs": {"reg": 1.0}, **given, **how})
        return trainer, next(iter(batches_from(0)))[1][0]

    return open_


def dense(trainer: Any, one: Any) -> tuple[float, dict[str, float], dict[str, torch.Tensor]]:
    """(loss, terms, gradients) of the response terms on the logits that the whole model says, in float64."""
    whole, batch = copy.deepcopy(trainer.model.model).double(), in_float64(one.batch)
    logits = whole(**batch.inputs, use_cache=False).logits.flatten(0, 1)[batch.rows["response"]]
    view = trainer.see_teacher(one)
    said = Dense64(view.distributions["response"].logits().double())
    values = {n: t.loss(Rows(logits, batch.labels, said)).mean() for n, t in trainer.terms.items()}
    loss = sum(term.weight * values[name] for name, term in trainer.terms.items())
    loss.backward()
    gradients = {f"model.{name}": p.grad for name, p in whole.named_parameters() if p.grad is not None}
    return float(loss.detach()), {name: float(value.detach()) for name, value in values.items()}, gradients


@pytest.mark.parametrize("kind", ["plain", "cap", "scale", "odd scale"])
def test_losses_and_gradients_are_those_of_the_whole_model(opened: Callable[..., Any], kind: str) -> None:
    trainer, one = opened(kind)
    assert set(trainer.terms) == {"reg", "res"}
    expected_loss, expected_terms, expected = dense(trainer, one)
    trainer._clip = lambda: 1.0  # gradients are looked at
    trainer.optimizer.zero_grad = lambda set_to_none=True: None
    result = trainer.step(0, [one])
    assert result.loss == pytest.approx(expected_loss, rel=1e-5)
    assert result.terms == pytest.approx(expected_terms, rel=1e-5)
    found = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    assert found.keys() == {name for name in expected if name in found} and len(found) > 20
    error = torch.cat([(found[name].double() - expected[name]).flatten() for name in found]).norm()
    assert error <= 1e-4 * torch.cat([expected[name].flatten() for name in found]).norm()


@pytest.mark.parametrize("kind", ["cap", "odd scale"])
def test_what_its_own_weights_teach_is_what_the_model_says(opened: Callable[..., Any], kind: str) -> None:
    trainer, one = opened(kind)
    said = trainer._own_words(one.batch, Passes())["response"]
    with torch.no_grad():
        logits = trainer.model.model(**one.batch.inputs, use_cache=False).logits.flatten(0, 1)[
            one.batch.rows["response"]
        ]
    torch.testing.assert_close(said[3:9].logits(), logits[3:9], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(said.logits_at(torch.tensor([5, 2])), logits[:, [5, 2]], rtol=1e-5, atol=1e-5)


def test_matching_costs_are_of_capped_logits() -> None:
    """A student whose products are far beyond its cap: every cost moves."""
    draw = torch.Generator().manual_seed(0)
    teacher, hidden, head = (torch.randn(n, 6, generator=draw) for n in (12, 8, 40))
    groups = [MatchGroup(torch.arange(12), torch.arange(8))]
    side = DenseTeacher(teacher, torch.randn(40, 6, generator=draw))
    ours = cap_in_place(hidden @ head.T, 1.5)
    for space, of in (("logits", lambda z: z), ("probs", lambda z: z.softmax(1))):
        want = (of(side.logits())[:, None] - of(ours)[None]).abs().sum(2).double()
        (cost,) = manhattan_costs(side, hidden, head, groups, space, 1.5)
        torch.testing.assert_close(cost, want, rtol=1e-5, atol=1e-5)
    (cost,) = column_sampled_costs(side, hidden, head, groups, 40, torch.Generator(), 1.5)
    torch.testing.assert_close(cost, (side.logits()[:, None] - ours[None]).abs().sum(2).double(), rtol=1e-5, atol=1e-4)


def test_matched_rows_of_a_capped_student_are_trained(opened: Callable[..., Any]) -> None:
    trainer, one = opened("cap", method="em-kd", knobs=None)
    result = trainer.step(0, [one])
    assert result.grad_norm > 0 and all(value > 0 for value in result.terms.values())


def test_relations_of_a_capped_student_are_refused(opened: Callable[..., Any]) -> None:
    trainer, one = opened("cap", method="llava-kd", knobs=None)
    fix = r"PaliGemmaForConditionalGeneration caps its logits softly \(at 3\): relations .* use a method or knobs without them"
    with pytest.raises(CompatibilityError, match=fix):
        trainer.step(0, [one])


def test_the_first_batch_is_held_to_the_models_own_logits(opened: Callable[..., Any]) -> None:
    """Under dropout too, which is off for the comparison alone; a head that does more by itself is refused before a step is taken."""
    trainer, one = opened("plain")
    model = trainer.model.model
    for layer in model.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.5
    trainer.model.train()
    trainer.step(0, [one])
    assert trainer.model._head_checked and all(module.training for module in model.modules())
    trainer, one = opened("plain")
    before = copy.deepcopy(trainer.model.state_dict())
    head = trainer.model.model.lm_head
    head.forward = lambda states: 1.05 * states @ head.weight.T
    with pytest.raises(CompatibilityError, match="LlavaForConditionalGeneration are not those of its head"):
        trainer.step(0, [one])
    assert all(torch.equal(one, before[name]) for name, one in trainer.model.state_dict().items())


def test_expected_answers_are_as_likely_as_the_model_says(capped_student: Path, world: Any) -> None:
    from pipelines.judge.evaluation.answers import expected
    from student_train.load_student import load_student
    from teacher_cache.preparing.prepare import Preparer
    from teacher_cache.sources import DataSpec, open_source

    model, processor = load_student(str(capped_student), "sdpa")  # which Gemma 2 has not
    spec = DataSpec("sft", world.train)
    source = open_source(spec)
    row = next(one for group in source.scan(100) for one in source.read(group))
    row = replace(row, turns=row.turns[:2])
    preparer = Preparer(processor, model.config)
    (found,) = expected(RowForward(model.eval()), preparer, [row], spec)
    prepared = preparer.prepare(row)
    with torch.no_grad():
        logits = model.double()(
            input_ids=prepared.input_ids[None], pixel_values=prepared.pixels["pixel_values"].double()
        ).logits
    want = torch.nn.functional.cross_entropy(logits[0, prepared.response_rows], prepared.labels, reduction="none")
    torch.testing.assert_close(found.nats, want, rtol=1e-5, atol=1e-5)
    assert logits.abs().max() < CAP


@pytest.mark.parametrize("kind", ["cap", "odd scale"])
def test_fidelity_compares_gradients_of_those_logits(
    kind: str, tiny_student: Path, capped_student: Path, teacher_parts: Any, world: Any
) -> None:
    """What a leaf's gradient means for the head's own parameter, and for the hidden states, in float64."""
    from pipelines.judge.fidelity.rows import FidelitySample
    from pipelines.judge.fidelity.student import Student
    from student_train.load_student import load_student
    from teacher_cache.preparing.prepare import Preparer
    from teacher_cache.sources import DataSpec, open_source

    model, processor = load_student(str(capped_student if kind == "cap" else tiny_student), "sdpa")
    model = outer(model, after=lambda z: z / 3) if kind == "odd scale" else model
    source = open_source(DataSpec("sft", world.train))
    sample = next(one for group in source.scan(100) for one in source.read(group))
    prepared = Preparer(processor, model.config).prepare(sample)
    student = Student(model, [FidelitySample(prepared.key, sample, prepared, {})], [prepared], ("language_model",), 0)
    states, _ = student.forward([0])
    side = student.side(0, {name: one.detach() for name, one in states.items()})
    pull = torch.randn(len(prepared.labels), len(side.head), generator=torch.Generator().manual_seed(0))
    logits = side.logits(side.hidden["response"])
    at_head, at_states = torch.autograd.grad((logits * pull).sum(), [side.head, side.hidden["response"]])
    into = student.no_gradient()
    student.pull_head(at_head, into)

    hidden, weight = side.hidden["response"].detach().double(), model.get_output_embeddings().weight.detach().double()
    product = (hidden.requires_grad_() @ weight.requires_grad_().T) * student.model.form.scale
    dense = product if student.cap is None else CAP * torch.tanh(product / CAP)
    own_head, own_states = torch.autograd.grad((dense * pull.double()).sum(), [weight, hidden])
    for found, want in ((logits, dense), (into[student._head_at], own_head), (at_states, own_states)):
        torch.testing.assert_close(found.double(), want, rtol=1e-4, atol=1e-5 * float(want.detach().abs().max()))
