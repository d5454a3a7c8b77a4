"""What every field promises, run over each field that the folder holds."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.codecs import container
from teacher_cache.errors import CacheError, KdcliError
from teacher_cache.fields import create_field, field_kinds, open_field
from teacher_cache.records import Prepared, Sketch, TeacherOutput, TextTokens, TopK
from teacher_cache.teachers.head import topk_rows

PLAIN = {"coding": "plain"}
PARAMS: dict[str, list[dict[str, Any]]] = {
    "vision_topk": [{}, {"k": 3, **PLAIN, "value_dtype": "float32"}, {"k": 1}, {"k": 1, **PLAIN}],
    "response_topk": [{}, {"k": 3, **PLAIN, "value_dtype": "float32"}, {"k": 1}, {"k": 1, **PLAIN}],
    "vision_hidden": [{}, {"codec": "fp32"}, {"codec": "int8"}, {"codec": "int4"}, {"codec": "sketch", "step": 0.2}],
    "response_hidden": [{}, {"codec": "fp32"}, {"codec": "int8"}, {"codec": "int4"}, {"codec": "sketch"}],
    "affinity": [{}, {"layout": "factored"}],
    "relation": [{}],
}
CASES = [(name, params) for name, each in PARAMS.items() for params in each]
V, D = 90, 12


def prepared(text_tokens: int) -> Prepared:
    """Fields read counts at most: the rest may be empty."""
    flags = torch.zeros(text_tokens, dtype=torch.bool)
    text = TextTokens(flags.to(torch.uint32), flags.to(torch.uint8), flags.to(torch.uint16), flags, ())
    empty = torch.zeros(0, dtype=torch.int64)
    return Prepared("k", "p", empty, empty, empty, empty, empty, text, (), {})


def output(seed: int, vision: int, response: int, text: int, scale: float = 1.0) -> TeacherOutput:
    generator = torch.Generator().manual_seed(seed)
    head = torch.randn(V, D, generator=generator) * scale
    hidden = {
        name: torch.randn(rows, D, generator=generator)
        for name, rows in (("vision", vision), ("response", response), ("text", text))
    }
    topk = {name: topk_rows(hidden[name], head, 64) for name in ("vision", "response")}
    logits = hidden["vision"] @ head.T
    return TeacherOutput(hidden, topk, logits @ logits.T)


def stored(field: Any, said: TeacherOutput, text: int) -> dict[str, torch.Tensor]:
    return container.unpack(container.pack(field.encode(prepared(text), said)))


def flat(decoded: Any) -> list[torch.Tensor]:
    return list(vars(decoded).values()) if isinstance(decoded, TopK | Sketch) else [decoded]


def ready(name: str, params: dict[str, Any]) -> Any:
    """The field, fitted on rows like those of ``output`` where it needs a calibration."""
    field = create_field(name, params)
    if not field.calibrated:
        return field
    head = torch.randn(V, D, generator=torch.Generator().manual_seed(0))
    return field.with_calibration(field.fit([output(seed, 6, 5, 7) for seed in range(90, 102)], head).tensors)


def test_every_field_is_listed() -> None:
    assert set(field_kinds()) == set(PARAMS)


@pytest.mark.parametrize(("name", "params"), CASES)
def test_field_json_makes_the_same_field_again(name: str, params: dict[str, Any]) -> None:
    field = ready(name, params)
    described = json.loads(json.dumps({"version": field.version, "params": dict(field.params)}))
    again = open_field(name, described, field._calibration if field.calibrated else None)
    assert (again.name, again.version, again.params, again.wants) == (name, field.version, field.params, field.wants)
    said = output(0, 5, 4, 9)
    one, two = stored(field, said, 9), stored(again, said, 9)
    assert all(torch.equal(a, b) for a, b in zip(flat(field.decode(one)), flat(again.decode(two))))


@pytest.mark.parametrize(("name", "params"), CASES)
def test_fields_travel_to_worker_processes(name: str, params: dict[str, Any]) -> None:
    field = ready(name, params)
    again = pickle.loads(pickle.dumps(field))
    said = output(1, 3, 2, 4)
    assert (again.name, again.params, again.wants) == (name, field.params, field.wants)
    assert container.pack(again.encode(prepared(4), said)) == container.pack(field.encode(prepared(4), said))


@pytest.mark.parametrize(("name", "params"), CASES)
def test_equal_outputs_are_equal_bytes(name: str, params: dict[str, Any]) -> None:
    field = ready(name, params)
    packed = {container.pack(field.encode(prepared(6), output(2, 4, 3, 6))) for _ in range(3)}
    assert len(packed) == 1


@pytest.mark.parametrize(("name", "params"), CASES)
def test_text_only_rows_and_rows_without_labels(name: str, params: dict[str, Any]) -> None:
    field = ready(name, params)
    decoded = field.decode(stored(field, output(3, 0, 0, 5), 5))
    assert all(tensor.shape[0] == 0 for tensor in flat(decoded))
    if name == "affinity":
        assert decoded.shape == (0, 5)
    if name == "relation":
        assert decoded.shape == (0, 0)


@pytest.mark.parametrize(("name", "params"), CASES)
def test_unknown_versions_are_refused_by_name(name: str, params: dict[str, Any]) -> None:
    field = create_field(name, params)
    newer = {"version": field.version + 1, "params": {**field.params, "not_known_here": 1}}
    with pytest.raises(CacheError, match=f"field {name} version {field.version + 1} is not readable"):
        open_field(name, newer)


@pytest.mark.parametrize("name", PARAMS)
def test_unknown_parameters_are_refused(name: str) -> None:
    with pytest.raises(KdcliError, match=f"field {name}: .*kk|field {name}: unknown"):
        create_field(name, {"kk": 3})


def test_unknown_fields_and_values_list_the_choices() -> None:
    with pytest.raises(KdcliError, match="unknown field 'topk': the fields are affinity, relation"):
        create_field("topk")
    with pytest.raises(KdcliError, match="k must be at least 1"):
        create_field("vision_topk", {"k": 0})
    with pytest.raises(KdcliError, match="value_dtype must be one of float16, float32"):
        create_field("vision_topk", {"value_dtype": "int8"})
    with pytest.raises(CacheError, match="unknown codec 'jpeg'"):
        create_field("vision_hidden", {"codec": "jpeg"})
    with pytest.raises(CacheError, match="version 7"):
        create_field("vision_hidden", {"codec": "bf16", "codec_version": 7})


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.01, 1.0, 20.0]), st.sampled_from([1, 5, 64, 200]))
def test_topk_values_and_mass(seed: int, scale: float, k: int) -> None:
    said = output(seed, 4, 1, 1, scale)
    truth = topk_rows(
        said.hidden["vision"], torch.randn(V, D, generator=torch.Generator().manual_seed(seed)) * scale, k
    )
    said = TeacherOutput(said.hidden, {"vision": truth})
    for dtype, absolute in (("float32", 1e-5), ("float16", 0.06)):
        field = create_field("vision_topk", {"k": k, **PLAIN, "value_dtype": dtype})
        decoded = field.decode(stored(field, said, 1))
        assert torch.equal(decoded.ids, truth.ids) and decoded.ids.dtype == torch.int64
        head = decoded.log_probs.double().exp().sum(dim=1)
        torch.testing.assert_close(head + decoded.log_tail.double().exp(), torch.ones_like(head), atol=1e-6, rtol=0)
        # float16 keeps 11 bits: an entry of log-prob -100 is off by 0.03
        torch.testing.assert_close(decoded.log_probs, truth.log_probs, atol=absolute, rtol=1e-3)
        for name in ("log_tail", "log_z"):
            assert torch.equal(getattr(decoded, name), getattr(truth, name))


def test_topk_of_a_tiny_head_keeps_its_mass() -> None:
    """A flat row over a large vocabulary: the head's mass is 1e-5 and 1 - e^log_tail has no digit to lose."""
    logits = torch.randn(1, 150_000, generator=torch.Generator().manual_seed(0)) * 1e-3
    said = topk_rows(torch.ones(1, 1), logits.T.contiguous(), 2)
    field = create_field("vision_topk", {"k": 2, **PLAIN, "value_dtype": "float32"})
    decoded = field.decode(stored(field, TeacherOutput({}, {"vision": said}), 1))
    dense = logits.double().log_softmax(dim=1).topk(2, dim=1).values
    torch.testing.assert_close(decoded.log_probs.double(), dense, atol=1e-4, rtol=0)


def test_a_smaller_k_is_a_prefix_of_the_same_answer() -> None:
    """One teacher pass with the largest k serves several fields; a field cuts what is its own."""
    said = output(4, 6, 2, 3)
    field = create_field("vision_topk", {"k": 5, **PLAIN, "value_dtype": "float32"})
    assert stored(field, said, 3)["ids"].shape == (6, 5)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.sampled_from([1e-3, 1.0, 1e4]))
def test_relation_round_trip(seed: int, rows: int, scale: float) -> None:
    said = output(seed, rows, 1, 1, scale)
    field = create_field("relation")
    decoded = field.decode(stored(field, said, 1))
    assert torch.equal(decoded, decoded.T)
    assert ((decoded - said.gram).abs() <= said.gram.abs().amax() * 2.0**-11).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 20))
def test_affinity_round_trip(seed: int, vision: int, text: int) -> None:
    said = output(seed, vision, 1, text)
    field = create_field("affinity")
    decoded = field.decode(stored(field, said, text))
    truth = torch.nn.functional.cosine_similarity(said.hidden["vision"][:, None], said.hidden["text"][None], dim=2)
    assert decoded.shape == (vision, text)
    assert ((decoded - truth).abs() <= 1 / 254 + 1e-6).all()


def test_records_of_another_shape_are_cache_errors() -> None:
    with pytest.raises(CacheError, match="no triangle"):
        create_field("relation").decode({"upper": torch.zeros(4, dtype=torch.float16), "scale": torch.ones(1)})
    with pytest.raises(CacheError, match="a record holds"):
        create_field("vision_topk", PLAIN).decode({"ids": torch.zeros(1, 1)})
