"""Any bytes at all where a file of the cache, a mixture or a setting is read: the reader's own errors, never anything else.

A few inputs a reader here; ``python -m benchmarks.fuzz --inputs 100000`` for many.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.fuzz import MOST_GROWTH, chosen_names, fuzz
from benchmarks.fuzz_targets import VALUES, Target, random_bytes, small_cache, targets
from teacher_cache.codecs import container
from teacher_cache.errors import CacheError
from teacher_cache.planning.plan_file import parse_plan
from teacher_cache.shards.commit import parse_commit
from teacher_cache.shards.index import parse_index
from teacher_cache.shards.sealed import seal, unseal

INPUTS = 40
many = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
PARSERS: dict[str, Any] = {
    "plan": parse_plan,
    "commit": parse_commit,
    "index": lambda data, place: parse_index(data, place, 1 << 30, 1),
    "record": container.unpack,
}
DOCUMENTS = {"plan": "manifest.json", "commit": "samples/commits/000000.json"}


def only_cache_errors(kind: str, data: bytes) -> None:
    try:
        PARSERS[kind](data, "here")
    except CacheError as error:
        assert "here" in str(error)


def test_every_reader_of_foreign_bytes(tmp_path: Path) -> None:
    every = targets(tmp_path)
    assert len(every) > 30 and len({one.name for one in every}) == len(every)
    for target in every:
        found = fuzz(target, INPUTS, number=7)
        assert found["failure"] == "" and found["grown"] < MOST_GROWTH, target.name
        assert found["inputs"] >= INPUTS // 2, target.name


def test_what_must_not_come_out_is_noticed() -> None:
    """The fuzzer itself."""
    found = fuzz(Target("a reader that asks a dictionary", {b"": 0}.__getitem__, (ValueError,), (random_bytes,)), 30, 0)
    assert found["failure"].startswith("KeyError")


@many
@given(VALUES)
def test_any_sealed_value(value: Any) -> None:
    for kind in DOCUMENTS:
        if "\ud800" not in str(value):
            only_cache_errors(kind, seal({"format_version": value}))
        only_cache_errors(kind, json.dumps(value).encode())


@many
@given(st.dictionaries(st.text(max_size=5).filter(lambda k: k != "sha256"), VALUES, max_size=4))
def test_seal_round_trip(body: dict[str, Any]) -> None:
    sealed = seal(body)
    assert seal(unseal(sealed, "")) == sealed


def test_deep_nesting() -> None:
    for kind in PARSERS:
        only_cache_errors(kind, b"[" * 100_000)
        only_cache_errors(kind, b'{"a":' * 100_000)


def test_a_calibration_whose_tables_are_none() -> None:
    """The library behind them takes even negative probabilities, and decodes something."""
    from teacher_cache.fields.calibration import tables_of

    for each in ([0.0, 1.0], [float("nan")] * 3, [-1.0, 2.0], [1.0], [float("inf"), 1.0]):
        with pytest.raises(CacheError, match="an invalid table"):
            tables_of({"table.ids": torch.tensor(each), "low.ids": torch.tensor([0])})
    with pytest.raises(CacheError, match="an invalid table"):
        tables_of({"table.ids": torch.tensor([0.5, 0.5]), "low.ids": torch.tensor([1 << 40])})
    with pytest.raises(CacheError, match="where it begins"):
        tables_of({"table.ids": torch.tensor([0.5, 0.5])})


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_another_format_version_is_refused_by_name(kind: str) -> None:
    body = unseal(small_cache()[DOCUMENTS[kind]], "") | {"format_version": 2}
    with pytest.raises(CacheError, match="format version '2'; this kdcli reads 1"):
        PARSERS[kind](seal(body), "here")


def test_targets_by_whole_name_else_by_part_of_it() -> None:
    names = ["a record", "a record, version 1", "index"]
    assert chosen_names(names, None) == names
    assert chosen_names(names, ["index", "a record"]) == ["a record", "index"]
    assert chosen_names(names, ["record"]) == names[:2]
    with pytest.raises(SystemExit, match="'tar' is part of no target's name: choose from 'a record'"):
        chosen_names(names, ["index", "tar"])
