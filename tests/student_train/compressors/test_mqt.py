"""mqt against plain attention, its prefixes, its draws, and batches that lose vision tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from student_train.compression import with_grid
from student_train.compressors import CompressorSpec, Site
from student_train.compressors.attention import CrossAttention
from student_train.compressors.mqt import place_table, resized, settle
from teacher_cache.errors import CompatibilityError
from teacher_cache.preparing.batch import collate, keep_vision

SITE = Site(6, 8, 10, (-1,), 3)


@pytest.mark.parametrize("keep", [36, 7, 1])
def test_one_cross_attention(
    make_compressor: Callable[..., Any], assert_same: Callable[..., None], attend: Callable[..., Any], keep: int
) -> None:
    made = make_compressor("mqt", 9)
    one = made.module
    one.keep = keep
    for parameter in one.parameters():
        torch.nn.init.normal_(parameter)

    def reference(features: torch.Tensor) -> torch.Tensor:
        places = place_table(6, 8, features)
        queries = one.query_norm(one.queries + places).expand(2, -1, -1)
        keys = one.key_norm(places).expand(2, -1, -1)
        return one.out(attend(one.attention, queries, keys, one.value_norm(features)))[:, :keep]

    assert_same(made, reference)


def test_several_heads(attend: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    attention = CrossAttention(512, 128).double()
    assert attention.heads == 4 and CrossAttention(48, 128).heads == 1 and CrossAttention(1152, 128).heads == 9
    queries, keys, values = (torch.randn(2, n, 512, dtype=torch.float64) for n in (3, 5, 5))
    torch.testing.assert_close(attention(queries, keys, values), attend(attention, queries, keys, values))


def test_places_are_told_apart() -> None:
    table = place_table(6, 8, torch.zeros(1))
    assert table.shape == (36, 8) and torch.cdist(table, table).fill_diagonal_(9).min() > 0.1
    wider = place_table(6, 10, torch.zeros(1, dtype=torch.float64))
    assert wider.shape == (36, 10) and not wider[:, 8:].any() and wider.dtype == torch.float64
    assert torch.equal(resized(table, 6), table) and resized(table, 9).shape == (81, 8)


def test_draws_are_even_reach_both_ends_and_need_seed_and_step_alone(make_compressor: Callable[..., Any]) -> None:
    module = make_compressor("mqt").module
    drawn = Counter(module.draw(seed=1, step=step) for step in range(2000))
    assert set(drawn) == set(range(2, 37, 2))
    assert max(drawn.values()) < 3 * min(drawn.values())
    torch.manual_seed(99)  # nothing that a process has of its own
    assert [module.draw(1, step) for step in range(5)] == [make_compressor("mqt").module.draw(1, s) for s in range(5)]
    assert [module.draw(2, step) for step in range(9)] != [module.draw(1, step) for step in range(9)]


def test_counts() -> None:
    settled = settle(CompressorSpec("mqt"), SITE)
    assert (settled.vision_tokens, settled.largest) == (9, 36)
    assert settle(CompressorSpec("mqt"), Site(24, 8, 8, (-1,), 3)).largest == 256
    assert settle(CompressorSpec("mqt"), Site(27, 8, 8, (-1,), 3)).largest == 256
    assert settle(CompressorSpec("mqt"), Site(5, 8, 8, (-1,), 3)).largest == 16
    assert settle(CompressorSpec("mqt", 8, largest=16), SITE).largest == 16
    for tokens in (0, 36, 40):
        with pytest.raises(CompatibilityError, match=rf"{tokens} vision tokens.*from 1 to 35"):
            settle(CompressorSpec("mqt", tokens), SITE)
    for largest in (7, 8, 9, 64):
        with pytest.raises(CompatibilityError, match="must be an even square, from 4 to the 36 patches"):
            settle(CompressorSpec("mqt", 4, largest=largest), SITE)


@pytest.fixture(scope="module")
def prepared_rows(tiny_student: Path, world: Any, world_json: Any) -> Callable[[int], list[Any]]:
    """``prepared_rows(m)``: captions, chats, two pictures in a row, none at all, prepared with m tokens an image."""
    from student_train.load_student import open_student
    from teacher_cache.preparing.prepare import Preparer
    from teacher_cache.records import Sample, SkipRecord, Turn
    from teacher_cache.sources import DataSpec, open_source

    processor, config, _ = open_student(str(tiny_student))
    specs = [
        DataSpec("caption", str(world.captions), image_root=str(world.images), template="plain"),
        DataSpec("sft", str(world_json.train), image_root=str(world_json.images)),
    ]
    samples = [(Sample("sft", 0, "", "talk", (Turn("user", "hello?"), Turn("assistant", "yes."))), "chat")]
    for spec in specs:
        source = open_source(spec)
        for group in source.scan(500):
            good = [row for row in source.read(group) if not isinstance(row, SkipRecord)][:14]
            samples += [(row, spec.template) for row in good]

    def prepare(tokens: int) -> list[Any]:
        from teacher_cache.errors import SkipSample

        own = with_grid(processor, CompressorSpec("mqt", tokens, largest=36))
        preparer, found = Preparer(own, config), []
        for row, template in samples:
            try:
                found.append(preparer.prepare(row, template))
            except SkipSample:
                continue
        return found

    return prepare


@pytest.mark.parametrize("keep", [2, 7, 36])
def test_dropping_tokens_is_preparing_with_fewer(prepared_rows: Callable[[int], list[Any]], keep: int) -> None:
    many, few = prepared_rows(36), prepared_rows(keep)
    pictures = {len(one.vision_positions) // 36 for one in many}
    assert pictures == {0, 1, 2} and {one.part for one in many} == {"caption", "sft"}
    for pick in (slice(None), slice(1, 4), slice(-3, None)):
        dropped, wanted = keep_vision(collate(many[pick], 7), keep, pad_id=7), collate(few[pick], 7)
        assert dropped.counts == wanted.counts and dropped.keys == wanted.keys
        for ours, theirs in ((dropped.inputs, wanted.inputs), (dropped.rows, wanted.rows)):
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert torch.equal(dropped.labels, wanted.labels)


def test_more_than_there_are_cannot_be_kept(prepared_rows: Callable[[int], list[Any]]) -> None:
    with pytest.raises(ValueError, match="cannot keep 5"):
        keep_vision(collate(prepared_rows(4)[:3], 0), 5, pad_id=0)
