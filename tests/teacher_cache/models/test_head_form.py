"""What a model makes of W·h is read off its own outer forward; what is of no known form is refused by name, whatever its weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BlipConfig, BlipForConditionalGeneration, LlavaForConditionalGeneration

from teacher_cache.errors import CompatibilityError
from teacher_cache.models.head import head_logits
from teacher_cache.models.head_form import HeadForm, check_rows, head_form
from teacher_cache.preparing.batch import collate
from teacher_cache.preparing.prepare import Preparer
from teacher_cache.records import Prepared
from teacher_cache.sources import open_source
from teacher_cache.teachers.backends import linear_head
from teacher_cache.teachers.transformers import TransformersTeacher
from teacher_cache.wants import Sampling, Wants
from tests.capped_model import CAP, capped_config

WANTS = Wants({"response"}, {"vision": 8, "response": 8}, {"response": Sampling("threshold", 8, 0)})


class Outer(LlavaForConditionalGeneration):
    """Makes logits of its own with ``after`` of W·h, and hidden states of its own with ``before``."""

    before = after = staticmethod(lambda values: values)

    def forward(self, logits_to_keep: Any = 0, **inputs: Any) -> Any:
        said = self.model(**inputs)
        states = said.last_hidden_state[
            :, slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        ]
        said.logits = self.after(self.lm_head(self.before(states)))
        return said


def outer(model: Any, **changes: Any) -> Any:
    copied = copy.deepcopy(model)
    copied.__class__ = type("Outer", (Outer,), {name: staticmethod(one) for name, one in changes.items()})
    return copied


def capped(model: Any, seed: int = 4) -> Any:
    from transformers import PaliGemmaForConditionalGeneration

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return PaliGemmaForConditionalGeneration(capped_config(model.config)).eval()


@pytest.fixture(scope="module")
def rows(teacher_parts: Any, mixture: Any) -> list[Prepared]:
    preparer, source = Preparer(*teacher_parts), open_source(mixture[1])
    read = [row for group in source.scan(100) for row in source.read(group)]
    return [preparer.prepare(row) for row in read[:3]]


@pytest.mark.parametrize(
    ("changes", "form"),
    [
        ({}, HeadForm()),
        ({"after": lambda z: z * 0.0625}, HeadForm(0.0625)),
        ({"after": lambda z: z / 6}, HeadForm(1 / 6)),
        ({"before": lambda h: h / 24}, HeadForm(1 / 24)),
        ({"after": lambda z: 30 * torch.tanh(z / 30)}, HeadForm(1.0, 30.0)),
        ({"after": lambda z: 20 * torch.tanh(z.float() * 0.2 / 20)}, HeadForm(0.2, 20.0)),
        ({"before": lambda h: h * 2, "after": lambda z: (z / 5).tanh() * 5}, HeadForm(2.0, 5.0)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_form_is_read_off_the_outer_forward(
    teacher_model: Any, changes: Any, form: HeadForm, dtype: torch.dtype
) -> None:
    found = head_form(outer(teacher_model, **changes).to(dtype))
    assert found.scale == pytest.approx(form.scale, rel=1e-7) and found.cap == form.cap
    assert (found.scale == 1.0) == (form.scale == 1.0)  # the weight itself, then


def test_names_in_a_configuration_prove_nothing(teacher_model: Any) -> None:
    """The same capped text configuration inside LLaVA, whose outer forward does not look at it, and inside PaliGemma."""
    from transformers import AutoModelForCausalLM, LlavaConfig, LlavaForConditionalGeneration

    config = capped_config(teacher_model.config)
    llava = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=config.vision_config, text_config=config.text_config, image_token_id=5)
    )
    assert head_form(llava) == HeadForm()
    assert head_form(capped(teacher_model)) == HeadForm(1.0, CAP)
    assert head_form(AutoModelForCausalLM.from_config(config.text_config)) == HeadForm(1.0, CAP)


@pytest.mark.parametrize(
    "changes",
    [
        {"after": lambda z: z + 0.1},
        {"after": lambda z: z.index_fill(2, torch.tensor(7), -1e30)},
        {"after": lambda z: z.clamp(-9, 9)},
        {"after": lambda z: z[..., :-3]},
        {"after": lambda z: -z},
        {"before": lambda h: h / h.norm(dim=-1, keepdim=True)},
        {"before": lambda h: h + 0.5},
    ],
    ids=["bias outside", "a column of its own", "clamp", "fewer columns", "negative", "norm behind the last", "shift"],
)
def test_logits_of_another_form_are_refused_by_name(teacher_model: Any, changes: Any) -> None:
    model = outer(teacher_model, **changes)
    model.config.get_text_config().logit_scale = 0.25
    with pytest.raises(CompatibilityError, match=r"the logits of Outer are not those of its head.*logit_scale = 0\.25"):
        head_form(model)


def test_heads_with_a_bias_and_models_without_a_decoder_are_one_line(teacher_model: Any) -> None:
    model = copy.deepcopy(teacher_model)
    model.lm_head = torch.nn.Linear(model.lm_head.in_features, model.lm_head.out_features)
    with pytest.raises(CompatibilityError, match="the head of LlavaForConditionalGeneration has a bias"):
        head_form(model)
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    text = {
        **small,
        "vocab_size": 30,
        "encoder_hidden_size": 8,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "sep_token_id": 2,
    }
    other = BlipForConditionalGeneration(
        BlipConfig(text_config=text, vision_config={**small, "image_size": 8, "patch_size": 4})
    )
    with pytest.raises(CompatibilityError, match="BlipForConditionalGeneration has no decoder"):
        head_form(other)


def test_a_look_leaves_the_model_as_it_was(teacher_model: Any) -> None:
    model = outer(teacher_model, after=lambda z: z / 2)
    ids = torch.arange(6)[None]
    before = model(input_ids=ids).logits
    own = model.model.forward
    model.model.forward = own  # as libraries that wrap a forward leave it
    head_form(model)
    assert model.model.forward is own and "forward" not in vars(model.lm_head)
    assert torch.equal(model(input_ids=ids).logits, before)


def test_the_first_batch_is_checked_whatever_was_read(teacher_model: Any, rows: list[Prepared]) -> None:
    """A head module that does more itself, which no outer forward shows; small errors are found relative to what is compared."""
    batch = collate(rows, 0)
    for scale, ok in ((1.0, True), (1.01, False), (1e-3, False)):
        model = copy.deepcopy(teacher_model)
        model.lm_head.forward = lambda x, w=model.lm_head.weight, s=scale: s * (x @ w.T)
        assert head_form(model) == HeadForm()
        states, head = model.model(**batch.inputs).last_hidden_state, model.lm_head.weight
        ask = (model, batch.inputs, states, lambda h, w=head: head_logits(h, w), len(head))
        if ok:
            assert check_rows(*ask)
        else:
            with pytest.raises(
                CompatibilityError, match=r"LlavaForConditionalGeneration are not those of its head.*off by"
            ):
                check_rows(*ask)
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    assert not check_rows(*ask)


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["cap", "scale", "odd scale"])
def test_a_teacher_says_what_its_whole_model_says(
    teacher_model: Any, teacher_parts: Any, rows: list[Prepared], kind: str
) -> None:
    makes = {
        "cap": lambda: capped(teacher_model),
        "scale": lambda: outer(teacher_model, after=lambda z: z * 0.25),
        "odd scale": lambda: outer(teacher_model, after=lambda z: z / 3),
    }
    model = makes[kind]()
    teacher = TransformersTeacher.wrap(model, teacher_parts[0])
    for one, got in zip(rows, teacher(rows, WANTS)):
        logits = model(input_ids=one.input_ids[None], **one.pixels).logits[0, :, : teacher.vocabulary].double()
        for name, at in (("response", one.response_rows), ("vision", one.vision_positions)):
            dense, topk = logits[at].log_softmax(1), got.topk[name]
            torch.testing.assert_close(topk.log_probs.double(), dense.topk(8, dim=1).values, atol=2e-4, rtol=0)
            torch.testing.assert_close(topk.log_z.double(), logits[at].logsumexp(1), atol=2e-4, rtol=1e-5)
        dense = logits[one.response_rows].log_softmax(1)
        entropy = -(dense.exp() * dense).sum(1)
        torch.testing.assert_close(got.sampled["response"].entropy.double(), entropy, atol=2e-4, rtol=1e-4)
        if kind != "cap":
            read = head_logits(got.hidden["response"], linear_head(teacher))
            torch.testing.assert_close(read.double(), logits[one.response_rows], atol=1e-4, rtol=1e-4)


def test_what_is_made_of_a_linear_head_is_refused_of_a_capped_one(
    teacher_model: Any, teacher_parts: Any, rows: list[Prepared]
) -> None:
    teacher = TransformersTeacher.wrap(capped(teacher_model), teacher_parts[0])
    fix = r"caps its logits softly \(at 3\).*--store compact"
    with pytest.raises(CompatibilityError, match=fix):
        teacher(rows, Wants(gram=True))
    with pytest.raises(CompatibilityError, match=fix):
        linear_head(teacher)


def test_capture_by_a_capped_teacher(tmp_path: Path, tiny_teacher: Path, make_request: Any) -> None:
    """Top-k fields are captured; hidden states, whole or sketched, are refused before anything but the plan is written."""
    from dataclasses import replace

    from pipelines.capture.cache_teacher import capture
    from tests.capped_model import build_capped

    folder = build_capped(tmp_path / "teacher", tiny_teacher)
    for fields, params in (
        (("response_hidden",), {}),
        (("response_hidden",), {"response_hidden": {"codec": "sketch"}}),
    ):
        request = make_request(tmp_path / "refused", teacher=folder, fields=fields)
        spec = replace(request.teacher, attn_implementation="eager")
        with pytest.raises(CompatibilityError, match=r"caps its logits softly.*--store compact"):
            capture(replace(request, teacher=spec, field_params=params or request.field_params))
        assert not list(tmp_path.glob("refused/fields/*/field.json"))
    request = make_request(tmp_path / "cache", teacher=folder, fields=("response_topk",))
    said = capture(replace(request, teacher=spec))
    assert said["rows"] == 31 and said["columns"]["fields/response_topk"]["rows"] == 31
