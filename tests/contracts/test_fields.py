"""What every field promises, run over each field that the folder holds."""

from __future__ import annotations

import json
import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.codecs import container, probabilities
from teacher_cache.errors import CacheError, KdcliError
from teacher_cache.fields import create_field, decode_record, decode_records, field_kinds, open_field
from teacher_cache.models.head import topk_rows
from teacher_cache.records import Prepared, TeacherOutput, TextTokens
from teacher_cache.signal_records import Sampled, Sketch, TopK
from teacher_cache.teachers.sampling import sample_batch
from teacher_cache.wants import NOTHING, Wants

SAMPLERS: list[dict[str, Any]] = [
    {},
    {"k": 3, "seed": 5},
    {"k": 400},
    {"sampler": "random"},
    {"sampler": "random", "draws": 700},
]
PARAMS: dict[str, list[dict[str, Any]]] = {
    "vision_topk": [{}, {"k": 3, "step": 0.25}, {"k": 1}],
    "response_topk": [{}, {"k": 3, "step": 0.25}, {"k": 1}],
    "vision_hidden": [{}, {"codec": "fp32"}, {"codec": "int8"}, {"codec": "int4"}, {"codec": "sketch", "step": 0.2}],
    "response_hidden": [{}, {"codec": "fp32"}, {"codec": "int8"}, {"codec": "int4"}, {"codec": "sketch"}],
    "vision_sampled": SAMPLERS,
    "response_sampled": SAMPLERS,
    "affinity": [
        {},
        {"text": "all"},
        {"layout": "factored"},
        {"layout": "factored", "text": "all"},
        {"layout": "factored", "text": "all", "codec_version": 1},
    ],
    "relation": [{}],
    "vision_features": [{}, {"codec": "fp32"}, {"codec": "int8"}],
    "attention": [{}, {"heads": "mean", "layer": 3, "step": 0.2}],
}
HEADS = 2
CASES = [(name, params) for name, each in PARAMS.items() for params in each]
V, D = 90, 12


def prepared(text_tokens: int) -> Prepared:
    """Fields read counts and which text tokens are of a response (two of three) at most: the rest may be empty."""
    flags = torch.arange(text_tokens) % 3 > 0
    text = TextTokens(flags.to(torch.uint32), flags.to(torch.uint8), flags.to(torch.uint16), flags, ())
    empty = torch.zeros(0, dtype=torch.int64)
    return Prepared("k", "p", empty, empty, empty, empty, empty, text, (), {})


def output(
    seed: int, vision: int, response: int, text: int, scale: float = 1.0, wants: Wants = NOTHING
) -> TeacherOutput:
    generator = torch.Generator().manual_seed(seed)
    head = torch.randn(V, D, generator=generator) * scale
    hidden = {
        name: torch.randn(rows, D, generator=generator)
        for name, rows in (("vision", vision), ("response", response), ("text", text))
    }
    topk = {name: topk_rows(hidden[name], head, 64) for name in ("vision", "response")}
    logits = hidden["vision"] @ head.T
    counts = {name: (len(one),) for name, one in hidden.items()}
    sampled = {name: one for name, (one,) in sample_batch(hidden, head, ["k"], counts, wants).items()}
    attention = attention_of(generator, HEADS, text, vision)
    return TeacherOutput(
        hidden,
        topk,
        logits @ logits.T,
        sampled=sampled,
        attention={0: attention, 3: attention},
        features=hidden["vision"],
    )


def attention_of(generator: torch.Generator, heads: int, text: int, vision: int) -> torch.Tensor:
    """``[H, N, R]``: the first text token stands before the image, the others pay all they have left to it."""
    scores = 4 * torch.randn(heads, text, vision + text, generator=generator)
    attention = torch.softmax(scores, dim=2)[:, :, :vision].contiguous()
    attention[:, :1] = 0.0
    return attention


def stored(field: Any, said: TeacherOutput, text: int) -> dict[str, torch.Tensor]:
    return container.unpack(container.pack(field.encode(prepared(text), said)))


def flat(decoded: Any) -> list[torch.Tensor]:
    """Its tensors; columns that are not stored, NaN, as 9."""
    if isinstance(decoded, TopK | Sketch | Sampled):
        return list(vars(decoded).values())
    return [decoded.nan_to_num(nan=9.0)]


def ready(name: str, params: dict[str, Any]) -> Any:
    """The field, fitted on rows like those of ``output`` where it needs a calibration."""
    field = create_field(name, params)
    if not field.calibrated:
        return field
    head = torch.randn(V, D, generator=torch.Generator().manual_seed(0))
    return field.with_calibration(field.fit([output(seed, 6, 5, 7) for seed in range(90, 102)], head).tensors)


def grounded() -> list[tuple[str, dict[str, Any]]]:
    fields: Any = [create_field(*case) for case in CASES]
    return [case for case, one in zip(CASES, fields) if one.calibrated and one.settled_last]


@pytest.mark.parametrize(("name", "params"), grounded())
def test_a_fit_is_its_end_on_a_ground_that_others_share(name: str, params: dict[str, Any]) -> None:
    field: Any = create_field(name, params)
    head = torch.randn(V, D, generator=torch.Generator().manual_seed(0))
    said = [output(seed, 6, 5, 7) for seed in range(90, 102)]
    other: Any = create_field(name, {**params, **{key: 3 * field.params[key] for key in field.settled_last}})
    for one, ground in ((field, other.ground(said, head)), (other, field.ground(said, head))):
        want, found = one.fit(said, head), one.fit_on(ground, head)
        assert want.rows == found.rows and want.tensors.keys() == found.tensors.keys()
        pairs = [(want.tensors, found.tensors), (want.low_rank_head, found.low_rank_head)]
        assert all(torch.equal(a[key], b[key]) for a, b in pairs for key in a)


def test_every_field_is_listed() -> None:
    assert set(field_kinds()) == set(PARAMS)


@pytest.mark.parametrize(("name", "params"), CASES)
def test_field_json_makes_the_same_field_again(name: str, params: dict[str, Any]) -> None:
    field = ready(name, params)
    described = json.loads(json.dumps({"version": field.version, "params": dict(field.params)}))
    again = open_field(name, described, field._calibration if field.calibrated else None)
    assert (again.name, again.version, again.params, again.wants) == (name, field.version, field.params, field.wants)
    said = output(0, 5, 4, 9, wants=field.wants)
    one, two = stored(field, said, 9), stored(again, said, 9)
    assert all(torch.equal(a, b) for a, b in zip(flat(field.decode(one)), flat(again.decode(two))))


@pytest.mark.parametrize(("name", "params"), CASES)
def test_records_read_together_are_those_read_one_by_one(name: str, params: dict[str, Any]) -> None:
    """Up to the rounding of a vectorised exponential; one that is damaged is named, and is alone to blame."""
    field = ready(name, params)
    shapes = [(6, 5, 7), (0, 3, 4), (6, 2, 9), (6, 5, 7), (9, 1, 3)]
    said = [output(20 + i, *shape, scale=3.0 if i == 2 else 1.0, wants=field.wants) for i, shape in enumerate(shapes)]
    records = [container.pack(field.encode(prepared(shape[2]), one)) for one, shape in zip(said, shapes)]
    alone = [decode_record(field, data, "alone") for data in records]
    together = decode_records(field, [(data, f"row {i}") for i, data in enumerate(records)])
    for one, other in zip(alone, together, strict=True):
        for a, b in zip(flat(one), flat(other), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    with pytest.raises(CacheError, match=r"^row 3: "):
        damaged = container.pack({"nothing": torch.zeros(1)})
        decode_records(field, [(damaged if i == 3 else data, f"row {i}") for i, data in enumerate(records)])


@pytest.mark.parametrize(("name", "params"), CASES)
def test_fields_travel_to_worker_processes(name: str, params: dict[str, Any]) -> None:
    field = ready(name, params)
    again = pickle.loads(pickle.dumps(field))
    said = output(1, 3, 2, 4, wants=field.wants)
    assert (again.name, again.params, again.wants) == (name, field.params, field.wants)
    assert container.pack(again.encode(prepared(4), said)) == container.pack(field.encode(prepared(4), said))


@pytest.mark.parametrize(("name", "params"), CASES)
def test_equal_outputs_are_equal_bytes(name: str, params: dict[str, Any]) -> None:
    field = ready(name, params)
    packed = {container.pack(field.encode(prepared(6), output(2, 4, 3, 6, wants=field.wants))) for _ in range(3)}
    assert len(packed) == 1


@pytest.mark.parametrize(("name", "params"), CASES)
def test_text_only_rows_and_rows_without_labels(name: str, params: dict[str, Any]) -> None:
    field = ready(name, params)
    decoded = field.decode(stored(field, output(3, 0, 0, 5, wants=field.wants), 5))
    assert all(0 in tensor.shape for tensor in flat(decoded))
    if name == "affinity":
        assert decoded.shape == (0, 5)
    if name == "relation":
        assert decoded.shape == (0, 0)
    if name == "attention":
        assert decoded.shape == (1 if params.get("heads") == "mean" else HEADS, 5, 0)


@pytest.mark.parametrize(("name", "params"), CASES)
def test_unknown_versions_are_refused_by_name(name: str, params: dict[str, Any]) -> None:
    field = create_field(name, params)
    next_version = max(getattr(field_kinds()[name], "VERSIONS", (create_field(name).version,))) + 1
    newer = {"version": next_version, "params": {**field.params, "not_known_here": 1}}
    with pytest.raises(CacheError, match=f"field {name} version {next_version} is not readable"):
        open_field(name, newer)


@pytest.mark.parametrize("name", PARAMS)
def test_unknown_parameters_are_refused(name: str) -> None:
    with pytest.raises(KdcliError, match=f"field {name}: .*kk|field {name}: unknown"):
        create_field(name, {"kk": 3})


def test_unknown_fields_and_values_list_the_choices() -> None:
    with pytest.raises(KdcliError, match="unknown field 'topk': the fields are affinity, attention, relation"):
        create_field("topk")
    with pytest.raises(KdcliError, match="k must be at least 1"):
        create_field("vision_topk", {"k": 0})
    with pytest.raises(KdcliError, match="coding 'packed' is no longer written: leave it out"):
        create_field("vision_topk", {"coding": "packed"})
    with pytest.raises(CacheError, match="unknown codec 'jpeg'"):
        create_field("vision_hidden", {"codec": "jpeg"})
    with pytest.raises(CacheError, match="version 7"):
        create_field("vision_hidden", {"codec": "bf16", "codec_version": 7})
    with pytest.raises(CacheError, match="unknown codec 'sketch' of vision_features: choose from bf16"):
        create_field("vision_features", {"codec": "sketch"})


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1e-3, 1.0, 5.0, 40.0]), st.sampled_from(SAMPLERS))
def test_samples_round_trip(seed: int, scale: float, params: dict[str, Any]) -> None:
    """Ids and entropy exactly; counts exactly; log-probs above the threshold to float16, the others' weight to float32."""
    field = create_field("vision_sampled", params)
    said = output(seed, 5, 1, 1, scale, field.wants)
    record = stored(field, said, 1)
    assert len(record) <= 4
    decoded, truth = field.decode(record), said.sampled["vision"]

    def dense(one: Sampled) -> torch.Tensor:
        return torch.zeros(5, V).scatter_add_(1, one.ids, one.weights)

    assert torch.equal(decoded.entropy, truth.entropy)
    assert torch.equal(dense(decoded) > 0, dense(truth) > 0)
    if params.get("sampler") == "random":
        torch.testing.assert_close(dense(decoded), dense(truth), atol=0, rtol=1e-6)
    else:
        # float16 holds a log-prob x to x·2⁻¹¹; the common factor moves the others by no more.
        bound = 2.0**-10 * dense(truth) * (1 + dense(truth).clamp_min(1e-30).log().abs())
        assert ((dense(decoded) - dense(truth)).abs() <= bound + 1e-7).all()
    torch.testing.assert_close(decoded.weights.sum(dim=1), torch.ones(5), atol=1e-6, rtol=0)


def test_bytes_of_samples() -> None:
    """k ids in w bits, a log-prob for those above the threshold, and 10 bytes a row; 6 where counts stand for weights."""
    threshold = create_field("vision_sampled", {"k": 12})
    record = stored(threshold, output(0, 200, 1, 1, 1.0, threshold.wants), 1)
    exact = record["exact"].numel()
    assert int(record["ids"][0]) == 7
    assert sum(tensor.nbytes for tensor in record.values()) == 1 + 200 * 12 * 7 // 8 + 2 * exact + 10 * 200
    random = create_field("vision_sampled", {"sampler": "random", "draws": 20})
    record = stored(random, output(0, 200, 1, 1, 1.0, random.wants), 1)
    unique = record["counts"].numel()
    assert sum(tensor.nbytes for tensor in record.values()) == 1 + -(-unique * 7 // 8) + unique + 5 * 200


def test_parameters_of_samples_are_checked() -> None:
    for params, message in [
        ({"sampler": "topk"}, "sampler must be one of threshold, random, got 'topk'"),
        ({"draws": 5}, "sampler = 'threshold' takes k, not draws"),
        ({"sampler": "random", "k": 5}, "sampler = 'random' takes draws, not k"),
        ({"k": 0}, "k must be in 1 … 65535, got 0"),
        ({"sampler": "random", "draws": 70_000}, "draws must be in 1 … 65535"),
    ]:
        with pytest.raises(KdcliError, match=message):
            create_field("response_sampled", params)


def test_damaged_samples_are_cache_errors() -> None:
    field = create_field("vision_sampled", {"k": 4})
    record = stored(field, output(0, 3, 1, 1, 4.0, field.wants), 1)
    damages = {
        "a record holds": {"ids": record["ids"]},
        "disagree": {**record, "scalars": record["scalars"][:2]},
        "do not hold 12 values": {**record, "ids": record["ids"][:-1]},
        "begin with their width": {**record, "ids": torch.zeros_like(record["ids"])},
        "exact where the sizes say": {**record, "exact": record["exact"][:-1]},
        "more exact ids than ids": {**record, "sizes": record["sizes"].flip(1)},
    }
    for message, damaged in damages.items():
        with pytest.raises(CacheError, match=message):
            field.decode(damaged)


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
    """Of response tokens, or of all: what is not stored is NaN."""
    said = output(seed, vision, 1, text)
    truth = torch.nn.functional.cosine_similarity(said.hidden["vision"][:, None], said.hidden["text"][None], dim=2)
    for params, kept in (({}, prepared(text).text.response), ({"text": "all"}, torch.ones(text, dtype=torch.bool))):
        field = create_field("affinity", params)
        decoded = field.decode(stored(field, said, text))
        assert decoded.shape == (vision, text) and decoded[:, ~kept].isnan().all()
        assert ((decoded - truth).abs()[:, kept] <= 1 / 254 + 1e-6).all()


def test_records_of_another_shape_are_cache_errors() -> None:
    with pytest.raises(CacheError, match="not a triangle"):
        create_field("relation").decode({"upper": torch.zeros(4, dtype=torch.float16), "scale": torch.ones(1)})


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 9), st.integers(0, 7), st.sampled_from([0.03, 0.05, 0.5]))
def test_attention_round_trip(seed: int, vision: int, text: int, step: float) -> None:
    """Every value within half a step of its logarithm, what is below the floor and what is 0 exactly 0."""
    said = output(seed, vision, 1, text)
    field = create_field("attention", {"step": step})
    truth, decoded = said.attention[0], field.decode(stored(field, said, text))
    assert decoded.shape == truth.shape == (HEADS, text, vision)
    small = truth <= probabilities.floor(step) * (1 + 1e-4)
    relative = (decoded / truth - 1)[~small].abs()
    assert (relative <= math.expm1(step / 2) + 1e-5).all() and (decoded[small] <= truth[small] * math.exp(step)).all()
    assert (decoded[truth == 0] == 0).all()
    mean = create_field("attention", {"heads": "mean", "step": step})
    torch.testing.assert_close(
        mean.decode(stored(mean, said, text)), truth.mean(0, keepdim=True), rtol=math.expm1(step / 2) + 1e-5, atol=1e-3
    )


def test_attention_before_the_image_is_cheap() -> None:
    said = output(0, 40, 1, 90)
    field = create_field("attention")
    late = said.attention[0].clone()
    late[:, :80] = 0.0  # an image that stands near the end
    sizes = [
        len(field.encode(prepared(90), TeacherOutput(attention={0: one}))["coded"]) for one in (late, said.attention[0])
    ]
    assert sizes[0] < 0.15 * sizes[1]


def test_parameters_and_values_of_attention_are_checked() -> None:
    for params, message in [
        ({"heads": "all"}, "heads must be one of each, mean, got 'all'"),
        ({"layer": -1}, "layer must be a whole number from 0, got -1"),
        ({"step": 0.001}, "step must be in"),
    ]:
        with pytest.raises(KdcliError, match=message):
            create_field("attention", params)
    field = create_field("attention")
    for value in (-0.1, 1.5, float("nan")):
        with pytest.raises(KdcliError, match="is not in"):
            field.encode(prepared(1), TeacherOutput(attention={0: torch.full((1, 1, 1), value)}))


def test_damaged_attention_is_a_cache_error() -> None:
    field = create_field("attention")
    record = stored(field, output(0, 3, 1, 4), 4)
    shape = record["shape"]
    damages: dict[str, dict[str, torch.Tensor]] = {
        "a record holds": {"coded": record["coded"]},
        "of shape": {**record, "shape": -shape},
        "bytes are not of shape": {**record, "shape": shape * 2},
        "at most 12 are read": {**record, "shape": torch.tensor([1, 3, 4], dtype=torch.int32)},
        "damaged compressed frame": {**record, "coded": record["coded"].flip(0)},
    }
    for message, damaged in damages.items():
        with pytest.raises(CacheError, match=message):
            field.decode(damaged)
    with pytest.raises(CacheError, match="of shape"):
        field.decode({**record, "shape": torch.full((3,), 2**30, dtype=torch.int32)})
