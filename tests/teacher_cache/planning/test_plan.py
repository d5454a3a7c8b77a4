"""Slices cover every row once, never straddle parts, are balanced; the plan is a function of content and flags alone."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.errors import CacheError, KdcliError
from teacher_cache.planning.make_plan import _balance, _shards_per_part, make_plan
from teacher_cache.planning.plan import Plan, difference
from teacher_cache.planning.plan_file import parse_plan, read_plan, write_plan
from teacher_cache.records import RowGroup
from teacher_cache.shards.storage import Storage
from teacher_cache.sources import DataSpec

PREPARATION = {"max_length": 2048, "tokenizer": {"sha256": "aa", "length": 5}}


def write_rows(folder: Path, name: str, rows: int, words: int = 3) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    written = [
        {
            "id": i,
            "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "word " * (1 + i % words)}],
        }
        for i in range(rows)
    ]
    (folder / name).write_text(json.dumps(written))
    return folder / name


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> list[DataSpec]:
    folder = tmp_path_factory.mktemp("mixture")
    write_rows(folder, "a.json", 90)
    write_rows(folder, "b.json", 1300, words=60)
    return [DataSpec("a", str(folder / "a.json")), DataSpec("b", str(folder / "b.json"))]


def plan(specs: list[DataSpec], shards: int = 7, seed: int = 0, preparation=PREPARATION) -> Plan:
    return make_plan(specs, shards, preparation, seed, image_tokens=10)


def covered(made: Plan) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {}
    for one in made.slices:
        rows.setdefault(one.part, []).extend(r for g in one.groups for r in range(g.start, g.start + g.rows))
    return {part: sorted(numbers) for part, numbers in rows.items()}


@pytest.mark.parametrize("shards", [2, 3, 7, 64, 500, 1390])
def test_every_row_once_and_exactly_so_many_shards(specs, shards: int) -> None:
    made = plan(specs, shards)
    assert len(made.slices) == shards
    assert all(one.rows for one in made.slices)
    assert covered(made) == {"a": list(range(90)), "b": list(range(1300))}


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(2, 80), st.integers(0, 5))
def test_any_small_mixture(tmp_path_factory, first: int, second: int, shards: int, seed: int) -> None:
    folder = tmp_path_factory.mktemp("m")
    parts = [DataSpec(n, str(write_rows(folder, f"{n}.json", rows))) for n, rows in (("x", first), ("y", second))]
    if shards > first + second:
        with pytest.raises(KdcliError, match=f"use at most --shards {first + second}"):
            plan(parts, shards, seed)
        return
    made = plan(parts, shards, seed)
    assert len(made.slices) == shards
    assert covered(made) == {"x": list(range(first)), "y": list(range(second))}


def test_slices_are_balanced_by_tokens(specs) -> None:
    made = plan(specs, 14)

    def cost(group: RowGroup) -> int:
        return group.characters // 4 + group.rows

    weights = [sum(cost(g) for g in one.groups) for one in made.slices if one.part == "b"]
    largest = max(cost(g) for one in made.slices for g in one.groups)
    assert max(weights) - min(weights) <= largest  # what greedy by falling cost guarantees


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=60), st.integers(1, 20))
def test_balance_never_loses_a_group_or_leaves_a_slice_empty(costs: list[int], count: int) -> None:
    groups = [RowGroup(i, 1, {}, cost, 0) for i, cost in enumerate(costs)]
    count = min(count, len(groups))
    chosen = _balance(groups, count, lambda group: group.characters + group.rows)
    assert sorted(g.start for one in chosen for g in one) == list(range(len(costs)))
    assert all(chosen)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 10**6), st.integers(1, 50)), min_size=1, max_size=6), st.integers(0, 200))
def test_shards_per_part(parts: list[tuple[int, int]], more: int) -> None:
    costs, rows = [c for c, _ in parts], [r for _, r in parts]
    shards = min(len(parts) + more, sum(rows))
    counts = _shards_per_part(costs, rows, shards)
    assert sum(counts) == shards
    assert all(1 <= count <= limit for count, limit in zip(counts, rows))


def test_determinism_and_seed(specs) -> None:
    assert plan(specs).to_bytes() == plan(specs).to_bytes()
    assert plan(specs, seed=1).plan_hash != plan(specs).plan_hash
    orders = {tuple(g.start for one in plan(specs, seed=s).slices for g in one.groups) for s in (0, 1, 2)}
    assert len(orders) == 3


def test_rows_are_permuted_before_slicing(specs) -> None:
    """The rows of one file in order would put neighbours (one source dataset) into one shard."""
    starts = [g.start for one in plan(specs, 14).slices for g in one.groups if one.part == "b"]
    assert starts != sorted(starts)


def test_a_moved_mixture_is_the_same_plan(specs, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(Path(specs[0].path).parent, tmp_path / "elsewhere"))
    again = [replace(spec, path=str(moved / Path(spec.path).name)) for spec in specs]
    assert plan(again).plan_hash == plan(specs).plan_hash
    storage = Storage(tmp_path / "cache")
    write_plan(storage, plan(specs))
    write_plan(storage, plan(again))
    assert parse_plan((tmp_path / "cache" / "manifest.json").read_bytes(), "").plan_hash == plan(specs).plan_hash


def test_one_changed_byte_of_the_mixture_is_another_plan(specs, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(Path(specs[0].path).parent, tmp_path / "elsewhere"))
    file = moved / "a.json"
    file.write_text(file.read_text().replace("word", "wort", 1))
    storage = Storage(tmp_path / "cache")
    write_plan(storage, plan(specs))
    other = plan([replace(specs[0], path=str(file)), specs[1]])
    with pytest.raises(CacheError, match=r"holds another plan; .*parts\.a\.data") as caught:
        write_plan(storage, other)
    assert "parts.a.data.files.0.sha256: cache " in str(caught.value)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda s: plan([replace(s[0], template="plain"), s[1]]), "parts.a.template: cache chat, here plain"),
        (lambda s: plan([replace(s[0], limit=80), s[1]]), "parts.a.rows: cache 90, here 80"),
        (lambda s: plan(s, seed=4), "seed: cache 0, here 4"),
        (lambda s: plan(s, 8), "slices: cache has 7, here 8"),
        (lambda s: plan(s, preparation={**PREPARATION, "max_length": 9}), "preparation.max_length: cache 2048, here 9"),
        (
            lambda s: plan(s, preparation={**PREPARATION, "tokenizer": {"sha256": "bb", "length": 5}}),
            "preparation.tokenizer.sha256: cache aa, here bb",
        ),
        (lambda s: plan([replace(s[0], max_image_pixels=5), s[1]]), "parts.a.max_image_pixels: cache 89478485, here 5"),
    ],
)
def test_another_plan_is_refused_with_a_readable_diff(specs, tmp_path: Path, change, line: str) -> None:
    storage = Storage(tmp_path / "cache")
    write_plan(storage, plan(specs))
    before = (tmp_path / "cache" / "manifest.json").read_bytes()
    with pytest.raises(CacheError, match="choose another --out") as caught:
        write_plan(storage, change(specs))
    assert line in str(caught.value)
    assert (tmp_path / "cache" / "manifest.json").read_bytes() == before


def test_bad_numbers_of_shards(specs) -> None:
    with pytest.raises(KdcliError, match="at least 1, got 0"):
        plan(specs, 0)
    with pytest.raises(KdcliError, match=r"1391 is more than the 1390 rows .*use at most --shards 1390"):
        plan(specs, 1391)
    with pytest.raises(KdcliError, match="2 parts need at least that many"):
        plan(specs, 1)


def test_parts_need_names_of_their_own(specs) -> None:
    with pytest.raises(KdcliError, match="different names, got a, a"):
        plan([specs[0], replace(specs[1], part="a")])


def test_a_mixture_without_rows(specs, tmp_path: Path) -> None:
    empty = DataSpec("e", str(write_rows(tmp_path, "e.json", 0)))
    with pytest.raises(KdcliError, match="holds no rows"):
        plan([empty])
    made = plan([empty, specs[0]])
    assert covered(made) == {"a": list(range(90))}
    assert [part.rows for part in made.parts] == [0, 90]


def test_round_trip_through_the_manifest(specs) -> None:
    made = plan(specs)
    again = parse_plan(made.to_bytes(), "here")
    assert again == replace(made, parts=again.parts, slices=again.slices, preparation=again.preparation)
    assert again.plan_hash == made.plan_hash
    assert again.slices == made.slices


def test_no_cache_here(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="no cache here"):
        read_plan(Storage(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="no cache here"):
        read_plan(Storage(tmp_path / "file"))


def test_difference_is_short() -> None:
    lines = difference({str(i): i for i in range(20)}, {str(i): -i for i in range(20)}, most=3)
    assert len(lines) == 4
    assert lines[-1] == "and 16 more differences"
    assert difference({"a": {"b": 1}}, {"a": {}}) == ["a.b: cache 1, here absent"]
    assert difference({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}) == ["a.1.b: cache 2, here 3"]


def test_a_known_plan_is_taken_again_without_a_scan(specs: list[DataSpec], monkeypatch: pytest.MonkeyPatch) -> None:
    made = plan(specs)
    stored = parse_plan(made.to_bytes(), "manifest.json")
    with monkeypatch.context() as patched:
        patched.setattr("teacher_cache.planning.make_plan._scan", None)
        assert make_plan(specs, 7, PREPARATION, 0, 10, known=stored) == stored
        assert stored.plan_hash == made.plan_hash


def test_a_known_plan_of_anything_else_is_not_taken(specs: list[DataSpec], tmp_path: Path) -> None:
    known = plan(specs)
    moved = [DataSpec("a", str(write_rows(tmp_path, "a.json", 90))), specs[1]]
    longer = [DataSpec("a", str(write_rows(tmp_path, "longer.json", 91))), specs[1]]
    again = make_plan(moved, 7, PREPARATION, 0, 10, known=known)
    assert again.plan_hash == known.plan_hash and again.parts[0].spec == moved[0]
    others = [
        make_plan(longer, 7, PREPARATION, 0, 10, known=known),
        make_plan(specs, 8, PREPARATION, 0, 10, known=known),
        make_plan(specs, 7, PREPARATION, 1, 10, known=known),
        make_plan(specs, 7, PREPARATION | {"max_length": 9}, 0, 10, known=known),
        make_plan([specs[0], replace(specs[1], limit=800)], 7, PREPARATION, 0, 10, known=known),
        make_plan(specs[::-1], 7, PREPARATION, 0, 10, known=known),
    ]
    fresh = [
        plan(longer),
        plan(specs, shards=8),
        plan(specs, seed=1),
        plan(specs, 7, 0, PREPARATION | {"max_length": 9}),
    ]
    assert [one.plan_hash for one in others[:4]] == [one.plan_hash for one in fresh]
    assert known.plan_hash not in {one.plan_hash for one in others}
