"""Any bytes at all in a commit, index, manifest, sealed document or record: a CacheError, never anything else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from teacher_cache.codecs import container
from teacher_cache.errors import CacheError
from teacher_cache.plan import parse_plan
from teacher_cache.shards.commit import parse_commit
from teacher_cache.shards.index import parse_index
from teacher_cache.shards.sealed import seal, unseal

many = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="session")
def documents(tiny_cache: Path) -> dict[str, bytes]:
    index = sorted((tiny_cache / "samples" / "index").iterdir())[0]
    record = container.pack({"rows": torch.arange(6).reshape(2, 3), "scale": torch.ones(2)})
    return {
        "plan": (tiny_cache / "manifest.json").read_bytes(),
        "commit": (tiny_cache / "samples" / "commits" / "000000.json").read_bytes(),
        "index": index.read_bytes(),
        "record": record,
    }


PARSERS: dict[str, Any] = {
    "plan": parse_plan,
    "commit": parse_commit,
    "index": lambda data, place: parse_index(data, place, 1 << 30, 4),
    "record": container.unpack,
}


def only_cache_errors(kind: str, data: bytes) -> None:
    try:
        PARSERS[kind](data, "here")
    except CacheError as error:
        assert "here" in str(error)


@pytest.mark.parametrize("kind", PARSERS)
@many
@given(data=st.binary(max_size=200))
def test_random_bytes(kind: str, data: bytes) -> None:
    only_cache_errors(kind, data)


@pytest.mark.parametrize("kind", PARSERS)
@many
@given(data=st.data())
def test_flipped_and_cut(kind: str, documents: dict[str, bytes], data) -> None:
    whole = bytearray(documents[kind])
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    length = data.draw(st.sampled_from([len(whole), len(whole) // 2, len(whole) - 1]))
    only_cache_errors(kind, bytes(whole[:length]))


def replaced(document: Any, path: list[int], value: Any) -> Any:
    """The document with one value, found by choosing a child at each level, replaced."""
    if not path or not isinstance(document, dict | list) or not document:
        return value
    if isinstance(document, dict):
        key = sorted(document)[path[0] % len(document)]
        return {**document, key: replaced(document[key], path[1:], value)}
    at = path[0] % len(document)
    return [*document[:at], replaced(document[at], path[1:], value), *document[at + 1 :]]


@pytest.mark.parametrize("kind", ["plan", "commit"])
@many
@given(path=st.lists(st.integers(0, 20), min_size=1, max_size=6), value=json_values)
def test_sealed_but_of_another_shape(kind: str, documents: dict[str, bytes], path: list[int], value: Any) -> None:
    """A document with a valid checksum and a wrong value in it, as another program might write."""
    body = unseal(documents[kind], "")
    only_cache_errors(kind, seal(replaced(body, path, value)))


@many
@given(json_values)
def test_any_sealed_value(value: Any) -> None:
    for kind in ("plan", "commit"):
        only_cache_errors(kind, seal({"format_version": value}))
        only_cache_errors(kind, json.dumps(value).encode())


@many
@given(st.dictionaries(st.text(max_size=5).filter(lambda k: k != "sha256"), json_values, max_size=4))
def test_seal_round_trip(body: dict[str, Any]) -> None:
    sealed = seal(body)
    assert seal(unseal(sealed, "")) == sealed


def test_deep_nesting() -> None:
    for kind in PARSERS:
        only_cache_errors(kind, b"[" * 100_000)
        only_cache_errors(kind, b'{"a":' * 100_000)


@pytest.mark.parametrize("kind", ["plan", "commit"])
def test_another_format_version_is_refused_by_name(documents: dict[str, bytes], kind: str) -> None:
    body = unseal(documents[kind], "") | {"format_version": 2}
    with pytest.raises(CacheError, match="format version '2'; this kdcli reads 1"):
        PARSERS[kind](seal(body), "here")
