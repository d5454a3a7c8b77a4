"""A writer of small deterministic shards: no model, no mixture, bytes from a seed."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from teacher_cache.records import Prepared, RowGroup, SkipRecord, TextTokens
from teacher_cache.shards.commit import Commit
from teacher_cache.shards.storage import Storage
from teacher_cache.shards.writer import ShardWriter

ROWS = 7


def prepared(ordinal: int) -> Prepared:
    """Only what a writer looks at: key and counts."""
    length = 3 + ordinal % 4
    text = TextTokens(
        torch.arange(length).to(torch.uint32),
        torch.zeros(length, dtype=torch.uint8),
        torch.zeros(length, dtype=torch.uint16),
        torch.ones(length, dtype=torch.bool),
        (),
    )
    at = torch.arange(length)
    return Prepared(f"{ordinal:09d}-{ordinal:08x}", "sft", at, at[:2], at, at[1:], at[1:], text, (), {})


def payload(ordinal: int, ext: str) -> bytes:
    return random.Random(f"{ordinal}.{ext}").randbytes(20 + 300 * (ordinal % 3))


@pytest.fixture(scope="session")
def small_plan() -> Any:
    """Two slices of ``ROWS`` rows each."""
    from teacher_cache.planning.plan import Part, Plan, Slice
    from teacher_cache.sources import DataSpec

    groups = [RowGroup(start, ROWS, {"file": 0, "byte": 17 * start}, 100, 3) for start in (0, ROWS)]
    part = Part(
        DataSpec("sft", "rows.json"), {"files": [{"name": "rows.json", "sha256": "ab" * 32, "size": 9}]}, 2 * ROWS
    )
    return Plan((part,), tuple(Slice("sft", (group,)) for group in groups), {"max_length": 2048}, 0)


@pytest.fixture(scope="session")
def write_shard(small_plan: Any) -> Callable[..., Commit]:
    """``write_shard(storage, column, shard=0, salt=b"", hash="")``: six samples and one skip, committed."""

    def write(
        storage: Storage, column: str = "samples", shard: int = 0, salt: bytes = b"", column_hash: str = ""
    ) -> Commit:
        writer = ShardWriter(storage, column, shard, small_plan.plan_hash, column_hash)
        extensions = ("json", "tokens.safetensors", "0.jpg") if column == "samples" else ("safetensors",)
        for ordinal in range(shard * ROWS, shard * ROWS + ROWS - 1):
            writer.add(prepared(ordinal), {ext: payload(ordinal, ext) + salt for ext in extensions})
        place = f"rows.json row {shard * ROWS + ROWS - 1}"
        writer.skip(SkipRecord("sft", shard * ROWS + ROWS - 1, "id", place, "image_corrupt", "no image é"))
        return writer.commit()

    return write


@pytest.fixture
def small_cache(tmp_path: Any, small_plan: Any, write_shard: Callable[..., Commit]) -> Storage:
    """Two shards of ``samples`` and of one field ``fields/x``, whose commits are bound to the hash ``h``."""
    from teacher_cache.planning.plan_file import write_plan

    storage = Storage(tmp_path / "cache")
    write_plan(storage, small_plan)
    for shard in (0, 1):
        write_shard(storage, "samples", shard)
        write_shard(storage, "fields/x", shard, column_hash="h")
    return storage
