"""The backend vllm without vLLM: what goes to it and what came back when the contract was recorded, against transformers here.

`make test-vllm` runs vLLM itself on the same rows and records the contract anew.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from pipelines.capture.profiles import PROFILES, with_tails
from student_train.needs import Need, serve
from teacher_cache.errors import CompatibilityError, KdcliError
from teacher_cache.fields import create_field
from teacher_cache.preparing.batch import row_positions
from teacher_cache.records import Prepared
from teacher_cache.teachers import vllm
from teacher_cache.teachers.backends import load_head, load_processor, open_teacher, refuse_wants, teacher_fingerprint
from teacher_cache.teachers.signals import Signals
from teacher_cache.teachers.transformers import TeacherSpec, TransformersTeacher
from teacher_cache.teachers.vllm_answers import (
    LEAST_TAIL,
    Said,
    check_expansion,
    outputs_of_log_probs,
    outputs_of_states,
    prompt_of,
    topk_at,
)
from teacher_cache.teachers.vllm_engine import read_head, renamed
from teacher_cache.wants import Sampling, Wants
from tests.close import assert_close
from tests.contracts.vllm_rows import (
    BOUND,
    RECORDED,
    SIDE,
    TOPK,
    VERSIONS,
    WANTS,
    Flat,
    build_teacher,
    contract_rows,
    head_numbers,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_teacher(tmp_path_factory.mktemp("models") / "teacher")


@pytest.fixture(scope="module")
def teacher_parts(folder: Path) -> tuple[Any, Any]:
    return load_processor(TeacherSpec(str(folder)))


@pytest.fixture(scope="module")
def teacher_model(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def spec(folder: Path) -> TeacherSpec:
    return TeacherSpec(str(folder), dtype="float32", device="cpu", backend="vllm")


@pytest.fixture(scope="module")
def rows(teacher_parts) -> list[Prepared]:
    return contract_rows(*teacher_parts)


@pytest.fixture(scope="module")
def recorded() -> dict[str, torch.Tensor]:
    return load_file(RECORDED)


@pytest.fixture(scope="module")
def said(recorded, rows) -> list[Said]:
    return [Said(*(Flat(recorded, f"{n}.{part}") for part in ("prompt", "last"))) for n in range(len(rows))]


@pytest.fixture(scope="module")
def live(teacher_model, teacher_parts, rows):
    return TransformersTeacher.wrap(teacher_model, teacher_parts[0])(rows, WANTS)


def furthest(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max()) if ours.numel() else 0.0


def test_the_contract_is_of_this_teacher(spec, teacher_parts) -> None:
    """Other weights (another random generator, another order of initialisation) need a new recording: `make test-vllm`."""
    ours, theirs = head_numbers(load_head(spec, *teacher_parts)), json.loads(VERSIONS.read_text())["head"]
    assert_close(torch.tensor(ours), torch.tensor(theirs), 1e-5)


def test_prompts_have_one_placeholder_an_image(rows, recorded, teacher_parts) -> None:
    image = teacher_parts[1].image_token_id
    for number, one in enumerate(rows):
        prompt = prompt_of(one, image)
        ids = prompt["prompt_token_ids"]
        assert ids.count(image) == len(one.layout) == number
        assert [token for token in ids if token != image] == one.text.ids.tolist()
        assert ("multi_modal_data" in prompt) == bool(number)
        for picture in prompt.get("multi_modal_data", {}).get("image", []):
            assert picture.size == (SIDE, SIDE) and picture.mode == "RGB"
        check_expansion(one, recorded[f"{number}.expanded"].tolist())
    assert [len(one.images) for one in rows] == [0, 1, 2]


@pytest.mark.parametrize("damage", ["shorter", "longer", "other"])
def test_another_expansion_is_refused(rows, damage: str) -> None:
    ids = rows[1].input_ids.tolist()
    other = {"shorter": ids[:-1], "longer": [*ids, 7], "other": [*ids[:5], ids[5] + 1, *ids[6:]]}[damage]
    at = {"shorter": len(ids) - 1, "longer": len(ids), "other": 5}[damage]
    with pytest.raises(CompatibilityError, match=f"{len(other)} tokens.*position {at} on: use --backend transformers"):
        check_expansion(rows[1], other)


def test_recorded_states_give_what_transformers_says(spec, rows, recorded, live, teacher_parts) -> None:
    signals = Signals(load_head(spec, *teacher_parts))
    states = [recorded[f"{number}.states"] for number in range(len(rows))]
    for ours, theirs in zip(outputs_of_states(states, rows, WANTS, signals, torch.float32), live):
        for kind in ("vision", "response", "text"):
            assert furthest(ours.hidden[kind], theirs.hidden[kind]) < BOUND
        for kind in ("vision", "response"):
            for column in ("log_probs", "log_tail", "log_z"):
                assert furthest(getattr(ours.topk[kind], column), getattr(theirs.topk[kind], column)) < BOUND
        largest = theirs.gram.abs().max() if theirs.gram.numel() else 1.0
        assert furthest(ours.gram, theirs.gram) < BOUND * float(largest)


def test_states_of_another_length_are_refused(spec, rows, recorded, teacher_parts) -> None:
    signals = Signals(load_head(spec, *teacher_parts))
    with pytest.raises(CompatibilityError, match=r"vLLM gives \d+ states for"):
        outputs_of_states([recorded["1.states"][1:]], rows[1:2], WANTS, signals, torch.float32)


def test_recorded_log_probs_give_heads_of_the_whole_head(rows, said, teacher_model, teacher_parts) -> None:
    """Against log-probs over all rows of the head, padding too, dense in float64."""
    vocabulary = len(teacher_parts[0].tokenizer)
    for one, got in zip(rows, outputs_of_log_probs(said, rows, TOPK, vocabulary)):
        with torch.inference_mode():
            logits = teacher_model(one.input_ids[None], **one.pixels).logits[0].double()
        for kind in ("vision", "response"):
            at, topk = row_positions(one)[kind], got.topk[kind]
            dense = logits[at].log_softmax(dim=1)[:, :vocabulary]
            assert topk.ids.shape == (len(at), 8) and bool((topk.ids < vocabulary).all())
            assert furthest(topk.log_probs.double(), dense.topk(8, dim=1).values) < BOUND
            assert furthest(topk.log_probs.double(), dense.gather(1, topk.ids)) < BOUND
            assert furthest(topk.log_tail.double(), (1 - dense.topk(8, dim=1).values.exp().sum(1)).log()) < BOUND
            assert not topk.log_z.any()


def test_the_last_row_of_a_prompt_is_told_of_the_sampled_token(rows, said, teacher_model, teacher_parts) -> None:
    one, vocabulary = rows[1], len(teacher_parts[0].tokenizer)
    last = topk_at(said[1], torch.tensor([len(one) - 1]), 8, vocabulary, one.key)
    with torch.inference_mode():
        dense = teacher_model(one.input_ids[None], **one.pixels).logits[0, -1].double().log_softmax(dim=0)[:vocabulary]
    assert furthest(last.log_probs[0].double(), dense.topk(8).values) < BOUND


def flat(*positions: list[tuple[int, float]]) -> SimpleNamespace:
    """Flat log-probs of a prompt: nothing at position 0, then these entries."""
    ends = [0, *torch.tensor([len(one) for one in positions]).cumsum(0).tolist()]
    entries = [entry for one in positions for entry in one]
    return SimpleNamespace(
        start_indices=[0, *ends[:-1]],
        end_indices=ends,
        token_ids=[token for token, _ in entries],
        logprobs=[value for _, value in entries],
    )


def test_padding_of_the_head_is_dropped_and_missed() -> None:
    said = Said(flat([(3, -3.0), (9, -0.7), (1, -1.2), (3, -3.0)]), flat())
    got = topk_at(said, torch.tensor([0]), 2, 9, "a row")
    assert got.ids.tolist() == [[1, 3]]
    torch.testing.assert_close(got.log_tail.exp(), 1 - torch.tensor([-1.2, -3.0]).exp().sum(0, keepdim=True))
    with pytest.raises(CompatibilityError, match=r"row a row: vLLM gives 2 of 3 likeliest.*vllm_route"):
        topk_at(said, torch.tensor([0]), 3, 9, "a row")


def test_a_tail_that_rounding_ate_stays_finite() -> None:
    said = Said(flat([(1, 0.0), (1, 0.0), (2, -30.0)]), flat())
    got = topk_at(said, torch.tensor([0]), 2, 9, "a row")
    assert got.log_tail.exp().tolist() == pytest.approx([LEAST_TAIL])


@pytest.mark.parametrize(
    ("want", "route", "words"),
    [
        (Wants(attention={0: "mean"}), "hidden", "vLLM gives no attention"),
        (Wants(features=True), "hidden", "vLLM gives no features"),
        (Wants(hidden={"vision"}), "logprobs", "gives only top-k .*, no hidden states:"),
        (Wants(sampled={"vision": Sampling("threshold", 8, 0)}, gram=True), "logprobs", "no samples or Gram matrices:"),
    ],
)
def test_what_it_cannot_give(spec, want: Wants, route: str, words: str) -> None:
    with pytest.raises(CompatibilityError, match=f"{words}.*--backend transformers"):
        refuse_wants(replace(spec, vllm_route=route), Wants(topk={"vision": 8}) | want)
    refuse_wants(replace(spec, backend="transformers"), want)


def test_without_vllm_the_extra_is_named(spec, teacher_parts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for run in (teacher_fingerprint, open_teacher):
        with pytest.raises(KdcliError, match=r"pip install 'kdcli\[vllm\]'.*--backend transformers"):
            run(spec, *teacher_parts)


def test_the_fingerprint_names_version_route_and_norm(spec, teacher_parts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "vllm_version", lambda: "0.32.0")
    ours = teacher_fingerprint(spec, *teacher_parts)
    theirs = teacher_fingerprint(replace(spec, backend="transformers"), *teacher_parts)
    assert ours.pop("vllm") == {
        "version": "0.32.0",
        "route": "hidden",
        "states": "after the final norm, not normalised",
    }
    assert {key for key in theirs if ours[key] != theirs[key]} == {"backend", "attn_implementation"}


def test_heads_that_are_more_than_a_product_are_refused(spec, teacher_parts) -> None:
    text = SimpleNamespace(final_logit_softcapping=30.0)
    with pytest.raises(CompatibilityError, match="final_logit_softcapping"):
        vllm.refuse_head(spec, SimpleNamespace(get_text_config=lambda: text))
    vllm.refuse_head(spec, teacher_parts[1])


def test_the_head_comes_out_of_the_files(spec, teacher_parts, teacher_model, tmp_path: Path) -> None:
    length = len(teacher_parts[0].tokenizer)
    head = teacher_model.get_output_embeddings().weight.detach()[:length]
    assert torch.equal(load_head(spec, *teacher_parts), head)  # tied: the embeddings

    def refusal(**tensors: torch.Tensor) -> str:
        save_file({name.replace("__", "."): one for name, one in tensors.items()}, tmp_path / "model.safetensors")
        with pytest.raises(CompatibilityError) as caught:
            read_head(replace(spec, id=str(tmp_path)), teacher_parts[1], length, torch.float32)
        return str(caught.value)

    own = torch.randn(length + 7, head.shape[1])
    assert "has a bias" in refusal(lm_head__weight=own, lm_head__bias=own[0].clone())
    assert "hold no head" in refusal(norm__weight=own)
    assert "no head of" in refusal(lm_head__weight=own[:, 1:].contiguous())
    assert "quantised" in refusal(lm_head__weight=own.to(torch.int8))


def test_vision_towers_are_named_as_vllm_names_them() -> None:
    old = "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"
    assert renamed(old) == old == renamed(old.replace("vision_model.", ""))
    assert renamed("model.vision_tower.post_layernorm.bias") == "model.vision_tower.vision_model.post_layernorm.bias"
    assert renamed("language_model.model.norm.weight") == "language_model.model.norm.weight"


def test_inexact_tails_are_flagged_and_serve_alone(spec) -> None:
    """The flag is a parameter of the field: training says so, and no sketch is combined with it, whose raw logits need log Z."""
    wanted = with_tails(PROFILES["compact"], replace(spec, vllm_route="logprobs"))
    field = create_field("response_topk", wanted["response_topk"])
    assert field.params["tail"] == "inexact"
    assert "tail" not in create_field("response_topk", with_tails(PROFILES["compact"], spec)["response_topk"]).params
    with pytest.raises(KdcliError, match="tail must be one of exact, inexact"):
        create_field("response_topk", {"tail": "rough"})
    sketch = {"codec": "sketch"}
    alone = serve([Need("response_logits")], {"response_topk": field.params}, "kd", "")
    assert alone.fields["response_logits"] == ("response_topk",) and "inexact tail" in alone.notes[0]
    for params, fields in ((field.params, ("response_hidden",)), ({}, ("response_topk", "response_hidden"))):
        both = serve([Need("response_logits")], {"response_topk": params, "response_hidden": sketch}, "kd", "")
        assert both.fields["response_logits"] == fields


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"backend": "jax"}, "backend must be"),
        ({"vllm_route": "x"}, "vllm_route"),
        ({"vllm_memory": 1.5}, "vllm_memory"),
    ],
)
def test_settings_that_are_none(wrong: dict, words: str) -> None:
    with pytest.raises(KdcliError, match=words):
        TeacherSpec("teacher", **wrong)
