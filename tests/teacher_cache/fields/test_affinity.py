"""Factored affinities: cosines from coded unit states, and rows without an image."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity

from teacher_cache.codecs import container
from teacher_cache.errors import CacheError, KdcliError
from teacher_cache.fields import create_field, decode_record, open_field
from teacher_cache.fields.affinity import MANY_TEXT, columns_of
from teacher_cache.records import ImageLayout, Prepared, TeacherOutput, TextTokens, View

D = 40
LAYOUT = (ImageLayout((96, 96), (View((0, 0, 96, 96), (6, 6)),)),)
SPECTRUM = torch.logspace(0.5, -1, D)


def said(seed: int, text: int = 30, pictures: int = 1) -> TeacherOutput:
    """States around means of their own, as vision and text have."""
    generator = torch.Generator().manual_seed(seed)

    def rows(count: int, mean: float) -> torch.Tensor:
        return torch.randn(count, D, generator=generator) * SPECTRUM + mean * SPECTRUM.flip(0)

    return TeacherOutput({"vision": rows(36 * pictures, 0.4), "text": rows(text, -0.6)}, layout=LAYOUT * pictures)


def fitted(step: float = 0.03, seeds: range = range(60)) -> Any:
    field = create_field("affinity", {"layout": "factored", "step": step, "text": "all"})
    return field.with_calibration(field.fit([said(seed) for seed in seeds], torch.zeros(1, D)).tensors)


def exact(of: TeacherOutput) -> torch.Tensor:
    return cosine_similarity(of.hidden["vision"].double()[:, None], of.hidden["text"].double()[None], dim=2)


def decoded(field: Any, of: TeacherOutput) -> torch.Tensor:
    return field.decode(container.unpack(container.pack(field.encode(None, of))))


@pytest.mark.parametrize("step", [0.01, 0.03, 0.1])
def test_cosines_are_off_by_under_half_a_step(step: float) -> None:
    """Errors of both unit vectors, each Δ/√12 a dimension along the other: √2·Δ/√12 = 0.41·Δ (root mean square)."""
    field = fitted(step)
    errors = torch.cat([(decoded(field, said(seed)) - exact(said(seed))).flatten() for seed in range(100, 110)])
    assert float(errors.square().mean().sqrt()) <= 0.5 * step
    assert float(errors.abs().max()) <= 3 * step
    assert abs(float(errors.mean())) <= 0.1 * step, "no shift of all cosines"


@pytest.mark.parametrize(("text", "pictures"), [(1, 1), (7, 3), (500, 1), (0, 1)])
def test_any_number_of_rows_and_tokens(text: int, pictures: int) -> None:
    cosines = decoded(fitted(), said(200, text, pictures))
    assert cosines.shape == (36 * pictures, text) and cosines.dtype == torch.float32
    torch.testing.assert_close(cosines.double(), exact(said(200, text, pictures)), atol=0.12, rtol=0)


def test_rows_without_an_image_keep_their_width() -> None:
    """A text-only row is not among what is fitted, and costs a few bytes."""
    none = said(1, text=25, pictures=0)
    field = create_field("affinity", {"layout": "factored"})
    both = field.fit([said(seed) for seed in range(5)], torch.zeros(1, D)).tensors
    mixed = field.fit([none, *(said(seed) for seed in range(5)), none], torch.zeros(1, D)).tensors
    assert all(torch.equal(both[name], mixed[name]) for name in both)
    ready = field.with_calibration(mixed)
    assert sum(one.numel() * one.element_size() for one in ready.encode(None, none).values()) <= 24
    assert decoded(ready, none).shape == (0, 25)


def test_no_image_at_all_is_said() -> None:
    with pytest.raises(KdcliError, match=r"saw no vision rows: field affinity needs some; use layout = 'dense'"):
        create_field("affinity", {"layout": "factored"}).fit([said(1, pictures=0)], torch.zeros(1, D))
    with pytest.raises(KdcliError, match=r"field affinity: .* at least 80 .*--calibration-rows"):
        create_field("affinity", {"layout": "factored"}).fit([said(1)], torch.zeros(1, D))


def test_factors_are_smaller_than_cosines_where_tokens_are_many() -> None:
    of = said(300, text=1000, pictures=20)
    factored = fitted(0.1).encode(None, of)["coded"].numel()
    assert factored < 0.1 * create_field("affinity", {"text": "all"}).encode(None, of)["cosine"].numel()


@pytest.mark.parametrize("layout", ["dense", "factored"])
def test_states_of_no_length_have_no_direction(layout: str) -> None:
    of = said(7)
    of.hidden["vision"][3] = 0
    cosines = decoded(fitted() if layout == "factored" else create_field("affinity", {"text": "all"}), of)
    assert float(cosines[3].abs().max()) < 0.1 and torch.isfinite(cosines).all()


def test_step_belongs_to_factors() -> None:
    for params in ({"step": 0.1}, {"layout": "factored", "step": 0.0}, {"layout": "factored", "step": 1.0}):
        with pytest.raises(KdcliError, match="step belongs to layout = 'factored'"):
            create_field("affinity", params)
    with pytest.raises(KdcliError, match="layout must be one of dense, factored, got 'sparse'"):
        create_field("affinity", {"layout": "sparse"})
    with pytest.raises(KdcliError, match="text must be one of response, all, got 'prompt'"):
        create_field("affinity", {"text": "prompt"})


def row_of(flags: list[bool]) -> Prepared:
    """Of its text tokens, those of responses."""
    response = torch.tensor(flags, dtype=torch.bool)
    numbers = torch.zeros(len(flags), dtype=torch.uint8)
    text = TextTokens(numbers.to(torch.uint32), numbers, numbers.to(torch.uint16), response, ())
    nothing = torch.zeros(0, dtype=torch.int64)
    return Prepared("k", "p", nothing, nothing, nothing, nothing, nothing, text, (), {})


@cache
def of_responses(layout: str) -> Any:
    field = create_field("affinity", {"layout": layout})
    if layout == "dense":
        return field
    return field.with_calibration(field.fit([said(seed) for seed in range(60)], torch.zeros(1, D)).tensors)


@pytest.mark.parametrize("layout", ["dense", "factored"])
@settings(max_examples=25, deadline=None)
@given(flags=st.lists(st.booleans(), max_size=40))
def test_response_tokens_alone_are_stored(layout: str, flags: list[bool]) -> None:
    """Each column at its token, NaN at all others."""
    of, field, kept = said(5, len(flags)), of_responses(layout), torch.tensor(flags, dtype=torch.bool)
    cosines = field.decode(container.unpack(container.pack(field.encode(row_of(flags), of))))
    assert cosines.shape == (36, len(flags)) and cosines[:, ~kept].isnan().all()
    torch.testing.assert_close(cosines[:, kept].double(), exact(of)[:, kept], atol=0.12, rtol=0)


def test_tokens_that_are_not_stored_cost_nothing() -> None:
    of, field = said(6, 900), of_responses("factored")
    some, every = (
        field.encode(row_of(flags), of)["coded"].numel() for flags in ([True] * 90 + [False] * 810, [True] * 900)
    )
    assert some < 0.2 * every


@pytest.mark.parametrize(
    "numbers", [[], [-1], [40, 3], [40, 5, 3], [40, 3, 41], [40, 3, 9, 9, 12], [40, -1, 3], [2**20]]
)
def test_damaged_numbers_of_text_tokens_are_refused(numbers: list[int]) -> None:
    with pytest.raises(CacheError, match="text tokens are damaged"):
        columns_of(torch.tensor(numbers, dtype=torch.int32))
    with pytest.raises(CacheError, match="text tokens are damaged"):
        columns_of(torch.tensor([40, 3, 9], dtype=torch.int64))


@pytest.mark.parametrize("layout", ["dense", "factored"])
def test_a_record_that_names_other_text_tokens_is_refused(layout: str) -> None:
    field = of_responses(layout)
    stored = field.encode(row_of([True] * 7 + [False]), said(5, 8))
    with pytest.raises(CacheError, match="are named"):
        field.decode({**stored, "text": torch.tensor([8, 0, 6], dtype=torch.int32)})
    with pytest.raises(CacheError, match=r"^here: .*'text'"):
        decode_record(field, container.pack({name: one for name, one in stored.items() if name != "text"}), "here")


def test_many_text_tokens_have_a_longer_step() -> None:
    """Both kinds of records are read in one go; a step that is given is of all records, as it was before there were two."""
    field = of_responses("factored")
    samples = {length: said(8, length) for length in (MANY_TEXT - 1, MANY_TEXT, 30)}
    stored = [field.encode(row_of([True] * length), of) for length, of in samples.items()]
    errors = [
        float((one.double() - exact(of)).square().mean().sqrt())
        for one, of in zip(field.decode_many(stored), samples.values())
    ]
    assert errors[0] < 0.75 * errors[1] > errors[2]
    again = create_field("affinity", field.params, field._calibration)
    assert (again.params, again.version) == (field.params, 3)
    assert torch.equal(again.decode(stored[1]), field.decode(stored[1]))
    before = {key: value for key, value in field.params.items() if key != "long_step"}
    older = open_field("affinity", {"version": 2, "params": before}, field._calibration)
    assert (older.version, older.params) == (2, before)
    assert older.encode(row_of([True] * MANY_TEXT), said(8, MANY_TEXT))["text"].tolist() == stored[1]["text"].tolist()


@pytest.mark.parametrize("layout", ["dense", "factored"])
def test_version_1_is_read_and_written_as_it_was(layout: str) -> None:
    """All text tokens, and nothing in ``field.json`` of what came later."""
    params = {"layout": "dense"} if layout == "dense" else {"layout": "factored", "step": 0.03}
    calibration = fitted()._calibration if layout == "factored" else None
    field = open_field("affinity", {"version": 1, "params": params}, calibration)
    assert field.version == 1 and field.params == params
    stored = field.encode(row_of([False] * 9), said(5, 9))
    assert set(stored) == ({"cosine"} if layout == "dense" else {"coded"})
    torch.testing.assert_close(field.decode(stored).double(), exact(said(5, 9)), atol=0.12, rtol=0)
