"""Wants as a value: combined, compared, read; nothing that is no row kind or way of heads gets into one."""

from __future__ import annotations

import itertools
import pickle
from types import SimpleNamespace
from typing import Any

import pytest

from teacher_cache.errors import KdcliError
from teacher_cache.fields import create_field, field_kinds, wants_of
from teacher_cache.wants import Sampling, Wants

SINGLE = (
    Wants(hidden={"vision"}),
    Wants(hidden={"text"}),
    Wants(topk={"vision": 8}),
    Wants(topk={"vision": 3, "response": 50}),
    Wants(sampled={"response": Sampling("threshold", 12, 0)}),
    Wants(attention={0: "mean"}),
    Wants(attention={0: "each", 1: "mean"}),
    Wants(gram=True),
    Wants(features=True),
    Wants(),
)


@pytest.mark.parametrize(("one", "other"), itertools.product(SINGLE, SINGLE))
def test_what_serves_both_serves_each(one: Wants, other: Wants) -> None:
    both = one | other
    assert both == other | one and one <= both and other <= both
    assert (one <= other) == (both == other)
    assert both.row_kinds == one.row_kinds | other.row_kinds and both.head_kinds == one.head_kinds | other.head_kinds
    assert set(both.layers) == {*one.layers, *other.layers} and both.of_images == (one.of_images or other.of_images)
    assert pickle.loads(pickle.dumps(both)) == both


def test_the_larger_of_two() -> None:
    assert Wants(topk={"vision": 8}) | Wants(topk={"vision": 50}) == Wants(topk={"vision": 50})
    assert Wants(topk={"vision": 8}) <= Wants(topk={"vision": 50})
    assert not Wants(topk={"vision": 50}) <= Wants(topk={"vision": 8})
    assert Wants(attention={0: "mean"}) <= Wants(attention={0: "each"})
    assert not Wants(attention={0: "each"}) <= Wants(attention={0: "mean"})
    assert Wants.together(SINGLE).attention == {0: "each", 1: "mean"} and Wants.together([]) == Wants()


def test_two_ways_to_sample_a_kind_are_refused() -> None:
    threshold, random = (Wants(sampled={"vision": Sampling(one, 12, 0)}) for one in ("threshold", "random"))
    with pytest.raises(KdcliError, match="vision rows cannot be sampled in two ways at once"):
        threshold | random
    assert not threshold <= random and threshold <= threshold | Wants(gram=True)
    assert threshold.without_samples() == Wants()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"hidden": {"visoin"}}, "unknown row kind 'visoin' is wanted: choose from vision, response, text"),
        ({"topk": {"image": 8}}, "unknown row kind 'image'"),
        ({"attention": {0: "all"}}, "attention of 'all' heads is wanted: choose from mean, each"),
    ],
)
def test_what_no_teacher_says_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(KdcliError, match=said):
        Wants(**given)


def test_rows_that_are_read_and_those_that_the_head_reads() -> None:
    whole = Wants(hidden={"text"}, topk={"response": 1}, gram=True, attention={3: "mean"}, features=True)
    assert whole.row_kinds == {"text", "response", "vision"} and whole.head_kinds == {"response", "vision"}
    assert whole.layers == [0, 3] and Wants(attention={3: "mean"}).layers == [3]
    assert Wants(features=True).row_kinds == {"vision"} and not Wants(attention={3: "mean"}).row_kinds


def test_fields_together() -> None:
    fields = [create_field("response_topk", {"k": 8}), create_field("affinity"), create_field("vision_topk")]
    assert wants_of(fields) == Wants({"vision", "text"}, {"response": 8, "vision": 64})
    of_text = {name for name in field_kinds() if not create_field(name).wants.of_images}
    assert of_text == {"response_topk", "response_hidden", "response_sampled"}


@pytest.mark.parametrize("wants", [frozenset({"topk.response:1"}), {"hidden.vision"}, None])
def test_a_field_that_still_declares_strings_is_refused_in_one_line(wants: Any, monkeypatch) -> None:
    module = SimpleNamespace(
        FIELDS=("old",), create=lambda name, params: SimpleNamespace(wants=wants), __name__="acme.fields"
    )
    monkeypatch.setattr("teacher_cache.fields.field_kinds", lambda: {"old": module})
    with pytest.raises(
        KdcliError, match=r"field old of acme\.fields: wants is .*: declare a teacher_cache\.wants\.Wants"
    ) as error:
        create_field("old")
    assert len(str(error.value).splitlines()) == 1
