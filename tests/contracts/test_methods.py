"""What every distillation method promises, run over each method and preset that the folder holds, on real tiny models and caches."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from student_train import distributed
from student_train.distributions import DenseTeacher
from student_train.losses.terms import HiddenTerm, Rows, RowTerm, SampleTerm, kinds_of
from student_train.methods import create_method, hook, method_modules, terms_of
from student_train.needs import Need, serve, served_by
from student_train.stages import parse_stages
from student_train.teacher_view import TeacherView
from teacher_cache.errors import CompatibilityError
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.reading.cached_samples import CachedSamples
from tests.contracts.dense_reference import in_float64, live_view, load64, reference, teacher_batch

CASES = [(name, preset) for name, module in sorted(method_modules().items()) for preset in module.PRESETS]
each_method = pytest.mark.parametrize("name, preset", CASES, ids=lambda value: value)
MIXED = 31
"""Rows of one step: all captions and chats of the cache, two of them without a picture."""


@pytest.fixture(scope="module")
def full_cache(tmp_path_factory: pytest.TempPathFactory, make_request: Callable[..., Any]) -> Path:
    """The rows of ``tiny_cache`` with every field that any method needs."""
    from pipelines.capture.cache_teacher import capture
    from teacher_cache.fields import field_kinds

    out = tmp_path_factory.mktemp("caches") / "full"
    capture(make_request(out, fields=tuple(name for name in field_kinds() if not name.endswith("_sampled"))))
    return out


@pytest.fixture(scope="module")
def open_method(
    full_cache: Path, deep_student: Path, load_copy: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Any, Any]]:
    """``open_method(name, preset, **train settings)`` → (trainer, micro-batches of one step over captions and chats)."""
    from pipelines.settings import Settings
    from pipelines.train.stage_plans import plan_stages
    from pipelines.train.stage_trainer import make_trainer
    from student_train.config import StageSettings, TrainSettings

    def open_(
        name: str, preset: str, cache_url: Path = full_cache, knobs: dict[str, Any] | None = None, **changes: Any
    ) -> tuple[Any, Any]:
        given = {"per_device_train_batch_size": MIXED, "max_steps": 1, "report_to": "none", "seed": 1, **changes}
        train = TrainSettings(student=str(deep_student), **given)
        cache, stage = TeacherCache(str(cache_url)), parse_stages(method_modules()[name].STAGES)[-1]
        own = {stage.name: StageSettings(parts=("caption", "sft"))}
        (plan,) = plan_stages(cache, name, Settings(train=train, stages=own), stage.name, preset, knobs)
        rows = CachedSamples(cache, plan.parts, plan.served.names)
        model, processor = load_copy(deep_student)
        processes = distributed.Processes(0, 1, torch.device("cpu"))
        folder = tmp_path_factory.mktemp("method")
        trainer, batches_from = make_trainer(cache, plan, rows, model, processor, MIXED, MIXED, processes, folder)
        return trainer, next(iter(batches_from(0)))[1]

    return open_


@pytest.fixture(scope="module")
def topk_cache(tmp_path_factory: pytest.TempPathFactory, make_request: Callable[..., Any]) -> Path:
    """The rows of ``tiny_cache`` without hidden states: top-8 in float32, and the Gram matrices."""
    from pipelines.capture.cache_teacher import capture

    out = tmp_path_factory.mktemp("caches") / "topk"
    capture(make_request(out, fields=("response_topk", "vision_topk", "relation")))
    return out


def loss_and_gradients(trainer: Any, batches: Any) -> tuple[float, dict[str, float], dict[str, torch.Tensor]]:
    """One step's loss, terms, and the gradients as the optimizer would find them."""
    gradients: dict[str, torch.Tensor] = {}

    def keep() -> None:
        named = trainer.model.named_parameters()
        gradients.update({name: p.grad.clone() for name, p in named if p.grad is not None})

    trainer.optimizer.step = keep
    trainer.settings = trainer.settings.__class__(**{**vars(trainer.settings), "max_grad_norm": 0.0})
    result = trainer.step(0, batches)
    return result.loss, result.terms, gradients


@each_method
def test_a_method_describes_itself(name: str, preset: str) -> None:
    module = method_modules()[name]
    assert name == module.NAME and "arXiv" in module.PAPER and parse_stages(module.STAGES)
    assert "paper" in module.PRESETS, "the default preset"
    method = create_method(name, preset)
    assert is_dataclass(method) and method.__dataclass_params__.frozen  # type: ignore[attr-defined]
    with pytest.raises(AttributeError):
        method.anything = 1  # type: ignore[attr-defined]
    for knob in fields(method):
        assert create_method(name, preset, {knob.name: getattr(method, knob.name)}) == method
    assert all(isinstance(n, Need) and (served_by(n) or n.what == "self_teacher") for n in method.needs()), (
        "only needs that some field serves"
    )
    assert method.terms() and all(
        isinstance(term, RowTerm | HiddenTerm | SampleTerm) for term in method.terms().values()
    )
    assert all(term.weight for term in method.terms().values()), "a term of weight 0 costs its forward pass"
    assert method.terms().keys() <= terms_of(name).keys(), "TERMS explains every term"


@each_method
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_a_mixed_batch_has_finite_loss_and_gradients(
    open_method: Callable[..., Any], name: str, preset: str, bf16: bool
) -> None:
    trainer, batches = open_method(name, preset, bf16=bf16)
    counts = [count for one in batches for count in one.batch.counts["vision"]]
    assert 0 in counts and any(counts), "the batch is mixed"
    loss, terms, gradients = loss_and_gradients(trainer, batches)
    assert math.isfinite(loss) and loss > 0
    assert terms.keys() == trainer.terms.keys()
    assert loss == pytest.approx(sum(trainer.terms[n].weight * value for n, value in terms.items()), rel=1e-4)
    trained = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    behind = {n for n in trained if ".post_layernorm." in n}  # of a tower that trains: features are read before it
    assert gradients.keys() == trained - behind
    assert all(torch.isfinite(one).all() for one in gradients.values())
    assert all(one.any() for one in gradients.values()), "every trained parameter learns something"


@each_method
def test_padding_and_grouping_have_no_effect(open_method: Callable[..., Any], name: str, preset: str) -> None:
    """One padded batch, or every row on its own: the same loss and the same gradients."""
    loss, terms, gradients = loss_and_gradients(*open_method(name, preset))
    trainer, alone = open_method(name, preset, per_device_train_batch_size=1)
    assert len(alone) == MIXED
    single_loss, single_terms, single_gradients = loss_and_gradients(trainer, alone)
    assert single_loss == pytest.approx(loss, rel=1e-5) and single_terms == pytest.approx(terms, rel=1e-5, abs=1e-6)
    scale = max(float(one.abs().max()) for one in gradients.values())
    for parameter, one in gradients.items():
        torch.testing.assert_close(single_gradients[parameter], one, rtol=1e-3, atol=1e-6 * scale, msg=parameter)


CODED = {"vision_text_affinity": 5e-3, "text_vision_attention": 3e-2}
"""Needs that no field serves exactly, and how far the gradient may be off: cosines in 1/127, probabilities within 2.5 %."""


@pytest.fixture(scope="module")
def dense(
    open_method: Callable[..., Any], tiny_cache: Path, tiny_teacher: Path, teacher_parts: Any
) -> Callable[[str, str], Any]:
    """``dense(name, preset)`` → (loss, terms, gradients) by the live teacher and the student in float64, whole; computed once."""
    views: dict[Any, TeacherView] = {}

    @lru_cache
    def made(name: str, preset: str) -> Any:
        trainer, (one,) = open_method(name, preset)
        key = tuple(one.batch.keys)
        if key not in views:
            theirs = teacher_batch(tiny_cache, ("caption", "sft"), one.batch.keys, teacher_parts)
            tokens = len(teacher_parts[0].tokenizer)
            views[key] = live_view(load64(tiny_teacher), in_float64(theirs), tokens, one.text)
        return reference(trainer, one, views[key])

    return made


@each_method
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_a_step_equals_the_dense_float64_reference(
    open_method: Callable[..., Any], dense: Callable[[str, str], Any], name: str, preset: str, bf16: bool
) -> None:
    """From the cache, chunk by chunk, as from the live teacher in float64, whole: loss, terms and gradients."""
    trainer, (one,) = open_method(name, preset, bf16=bf16)
    expected_loss, expected_terms, expected = dense(name, preset)
    loss, terms, gradients = loss_and_gradients(trainer, [one])
    coded = max((CODED.get(need.what, 0.0) for need in trainer.method.needs()), default=0.0)
    # In bf16 a matching takes others of nearly equal pairs.
    tolerance = (0.2 if trainer.matching else 0.1) if bf16 else max(coded, 1e-3)
    assert loss == pytest.approx(expected_loss, rel=0.03 if bf16 else max(coded, 1e-4))
    assert terms == pytest.approx(expected_terms, rel=0.08 if bf16 else max(coded, 1e-4), abs=1e-5)
    assert gradients.keys() == expected.keys()
    flat = torch.cat([(gradients[n].double() - g).flatten() for n, g in expected.items()])
    assert flat.norm() <= tolerance * torch.cat([g.flatten() for g in expected.values()]).norm()


class Watched(Mapping[str, Any]):
    """A mapping that remembers what was looked up."""

    def __init__(self, inner: Mapping[str, Any]):
        self.inner, self.asked = inner, set[str]()

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return self.inner[key]

    def __iter__(self) -> Any:
        return iter(self.inner)

    def __len__(self) -> int:
        return len(self.inner)


@each_method
def test_needs_are_honest(open_method: Callable[..., Any], name: str, preset: str) -> None:
    """The terms work with exactly what ``needs`` asks for, and each need is used: taken away, the step fails."""
    trainer, batches = open_method(name, preset)
    needs = {need.what for need in trainer.method.needs()}
    rows = trainer.rows_of(0, batches)
    view = trainer.see_teacher(batches[0])
    assert told_by(view) == needs - {"self_teacher"}

    def loss() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return trainer.loss_of(batches[0], 0.0, trainer.terms, generator, rows.denominators, {})[0]

    assert torch.isfinite(loss())
    assert bool(getattr(hook(trainer.method, "passes")(0.5, torch.Generator()), "self_teacher", False)) == (
        "self_teacher" in needs
    )
    for need in needs - {"self_teacher"}:
        trainer.see_teacher = lambda one, need=need: without(view, need)
        with pytest.raises(AssertionError, match="did not declare"):
            loss()


ATTRIBUTES = {"vision_relation": "relations", "vision_raw_logits": "raw_vision"}


def told_by(view: TeacherView) -> set[str]:
    """The needs that a view serves."""
    told = {need for need, attribute in ATTRIBUTES.items() if getattr(view, attribute) is not None} | {*view.of_samples}
    return told | {f"{kind}_logits" for kind in view.distributions} | {f"{kind}_hidden" for kind in view.hidden}


def without(view: TeacherView, need: str) -> TeacherView:
    if need in ATTRIBUTES:
        return replace(view, **{ATTRIBUTES[need]: None})
    if need in view.of_samples:
        return replace(view, of_samples={key: one for key, one in view.of_samples.items() if key != need})
    kind, what = need.split("_")
    name = {"logits": "distributions", "hidden": "hidden"}[what]
    return replace(view, **{name: {key: one for key, one in getattr(view, name).items() if key != kind}})


@each_method
def test_only_the_served_fields_are_read(open_method: Callable[..., Any], name: str, preset: str) -> None:
    trainer, batches = open_method(name, preset)
    served = serve(trainer.method.needs(), {field: {"codec": "fp32"} for field in batches[0].fields}, name, "")
    assert set(batches[0].fields) == set(served.names)
    watched = Watched(batches[0].fields)
    trainer.see_teacher(type(batches[0])(batches[0].batch, batches[0].text, watched))
    assert watched.asked == set(served.names)


@each_method
def test_text_only_rows_alone(open_method: Callable[..., Any], name: str, preset: str) -> None:
    """A micro-batch without any picture has text terms only."""
    trainer, batches = open_method(name, preset, per_device_train_batch_size=1)
    text_only = [one for one in batches if not one.batch.counts["vision"][0]]
    loss, terms, _ = loss_and_gradients(trainer, text_only)
    assert math.isfinite(loss) and loss > 0
    for term_name, term in trainer.terms.items():
        if asks_itself(term):
            assert abs(terms[term_name]) < 1e-6, "without vision tokens both passes are one"
            continue
        assert (terms[term_name] == 0) == ("vision" in kinds_of({term_name: term}))


def asks_itself(term: Any) -> bool:
    """Whether a term compares the student with its own weights in another pass."""
    own = DenseTeacher(torch.zeros(1, 4), torch.eye(4))
    try:
        return isinstance(term, RowTerm) and term.loss(Rows(torch.ones(1, 4), None, None, own)) is not None
    except AssertionError:
        return False


LOGITS = ("response_logits", "vision_logits")


def logit_needs(name: str, preset: str) -> list[Need]:
    return [need for need in create_method(name, preset).needs() if need.what in LOGITS]


@each_method
def test_hidden_states_serve_exactly_and_top_k_from_below(
    open_method: Callable[..., Any], topk_cache: Path, name: str, preset: str
) -> None:
    """Exact fields win where a cache has both; from top-k alone every divergence is a lower bound, and the run says so."""
    trainer, batches = open_method(name, preset)
    assert not [field for field in batches[0].fields if field.endswith("_topk")]
    try:
        few, few_batches = open_method(name, preset, topk_cache)
    except CompatibilityError as refusal:
        assert any("topk" not in " ".join(served_by(need)) for need in trainer.method.needs()), refusal
        return
    _, exact, _ = loss_and_gradients(trainer, batches)
    loss, bound, gradients = loss_and_gradients(few, few_batches)
    assert math.isfinite(loss) and all(torch.isfinite(one).all() for one in gradients.values())
    for term, value in bound.items():
        if isinstance(few.terms[term], SampleTerm) or term == "reg" or asks_itself(few.terms[term]):
            assert value == pytest.approx(exact[term], rel=1e-3, abs=1e-6)  # Gram matrices are stored in float16
        else:
            assert 0 < value < exact[term]


@each_method
def test_what_top_k_loses_is_said(name: str, preset: str) -> None:
    topk = {f"{kind}_topk": {} for kind in ("response", "vision")}
    for need in logit_needs(name, preset):
        assert "lower bound" in " ".join(serve([need], topk, name, "").notes)
        assert not serve([need], {f"{need.what.split('_')[0]}_hidden": {"codec": "int8"}}, name, "").notes


@pytest.mark.parametrize(
    "name, preset",
    [case for case in CASES if hasattr(create_method(*case), "temperature") and logit_needs(*case)],
    ids=lambda value: value,
)
def test_another_temperature_needs_hidden_states(
    open_method: Callable[..., Any], topk_cache: Path, name: str, preset: str
) -> None:
    knobs = {"temperature": 2.0}
    assert all(need.temperature == 2.0 for need in create_method(name, preset, knobs).needs() if need.what in LOGITS)
    loss, _, _ = loss_and_gradients(*open_method(name, preset, knobs=knobs))
    assert math.isfinite(loss) and loss > 0
    with pytest.raises(CompatibilityError, match="add-field"):
        open_method(name, preset, topk_cache, knobs=knobs)
    topk = {f"{kind}_topk": {} for kind in ("response", "vision")}
    with pytest.raises(CompatibilityError, match=r"T=2.*temperature 1 only.*add-field"):
        serve([need for need in create_method(name, preset, knobs).needs() if need.what in LOGITS], topk, name, "there")


@each_method
def test_the_need_says_whose_mass_weighs(name: str, preset: str) -> None:
    """``forward`` promises that the teacher's samples would do: the gradient is p_s minus the mean of one-hot samples."""
    for need in logit_needs(name, preset):
        kind = need.what.split("_")[0]
        terms = [term for term in create_method(name, preset).terms().values() if isinstance(term, RowTerm)]
        logits = torch.tensor([[0.5, -1.0, 2.0, 0.0]], requires_grad=True)
        teacher = DenseTeacher(torch.tensor([[1.0, 0.0, -1.0, 0.5]]), torch.eye(4))
        for term in (one for one in terms if one.rows == kind):
            try:
                value = term.loss(Rows(logits, None, teacher))
            except AssertionError:
                continue  # cross-entropy
            (gradient,) = torch.autograd.grad(value.sum(), logits)
            linear = logits.softmax(1) - teacher.log_probs(need.temperature).exp()
            assert torch.allclose(gradient, linear, atol=1e-6) == (need.direction == "forward")
