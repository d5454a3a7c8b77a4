"""What every source format promises, run over each format that the folder holds.

A new format adds one writer to ``WRITERS``; a format without one fails here.
"""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from teacher_cache.records import Sample
from teacher_cache.sources import DataSpec, open_source, source_modules
from teacher_cache.sources.usable_samples import check_sample, row_key

ROWS = 23


def png(i: int) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (4, 3), (i, 0, 0)).save(buffer, "png")
    return buffer.getvalue()


def talk(i: int, image: bool) -> list[tuple[str, str]]:
    return [("user", "<image>\n" * image + f"question {i} ä😀"), ("assistant", f"answer {i}")]


def has_image(i: int) -> bool:
    return i % 3 != 0


def llava_turns(i: int, word: str) -> list[dict[str, str]]:
    names = {"user": "human", "assistant": "gpt"}
    return [{"from": names[role], "value": text + word * (role == "assistant")} for role, text in talk(i, has_image(i))]


def write_llava_json(folder: Path, rows: range, file: int, word: str) -> None:
    written = []
    for i in rows:
        (folder / f"{i}.png").write_bytes(png(i))
        written.append(
            {"id": "same", "conversations": llava_turns(i, word)} | ({"image": f"{i}.png"} if has_image(i) else {})
        )
    (folder / f"part-{file}.json").write_text(json.dumps(written))


def write_llava_next_parquet(folder: Path, rows: range, file: int, word: str) -> None:
    turns = pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    written = [
        {
            "id": "same",
            "conversations": llava_turns(i, word),
            "data_source": "x",
            "image": {"bytes": png(i), "path": f"{i}.png"} if has_image(i) else None,
        }
        for i in rows
    ]
    schema = pa.schema([("id", pa.string()), ("conversations", turns), ("data_source", pa.string()), ("image", image)])
    pq.write_table(pa.Table.from_pylist(written, schema=schema), folder / f"part-{file}.parquet", row_group_size=4)


def write_messages_jsonl(folder: Path, rows: range, file: int, word: str) -> None:
    lines = []
    for i in rows:
        (folder / f"{i}.png").write_bytes(png(i))
        messages: list[dict[str, Any]] = [
            {"role": role, "content": text + word * (role == "assistant")} for role, text in talk(i, False)
        ]
        if has_image(i):  # as a part of its own, which reads as the placeholder that LLaVA writes
            messages[0]["content"] = [{"type": "image"}, {"type": "text", "text": messages[0]["content"]}]
        lines.append({"id": "same", "messages": messages} | ({"images": [f"{i}.png"]} if has_image(i) else {}))
    (folder / f"part-{file}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_webdataset(folder: Path, rows: range, file: int, word: str) -> None:
    with tarfile.open(folder / f"part-{file}.tar", "w") as tar:
        for i in rows:
            row = json.dumps({"id": "same", "conversations": llava_turns(i, word)}).encode()
            for name, data in [(f"{i:05d}.json", row), *([(f"{i:05d}.png", png(i))] * has_image(i))]:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


WRITERS: dict[str, Callable[[Path, range, int, str], None]] = {
    "llava-json": write_llava_json,
    "llava-next-parquet": write_llava_next_parquet,
    "messages-jsonl": write_messages_jsonl,
    "webdataset": write_webdataset,
}


@pytest.fixture(params=sorted(source_modules()))
def write(request, tmp_path):
    """Write ROWS rows over two files in the format under test and give the glob that names them."""
    writer = WRITERS[request.param]

    def write_all(word: str = "") -> str:
        writer(tmp_path, range(10), 0, word)
        writer(tmp_path, range(10, ROWS), 1, "")
        return str(tmp_path / "part-*")

    write_all.format = request.param
    return write_all


def read_all(source, groups):
    return {group.start: list(source.read(group)) for group in groups}


def test_every_row_once_in_file_order(write):
    source = open_source(DataSpec("sft", write()))
    groups = source.scan(5)
    rows = [row for group in groups for row in source.read(group)]
    assert all(isinstance(row, Sample) for row in rows)
    assert [row.ordinal for row in rows] == list(range(ROWS))
    assert [[(turn.role, turn.text) for turn in row.turns] for row in rows] == [
        talk(i, has_image(i)) for i in range(ROWS)
    ]
    assert [[image.data for image in row.images] for row in rows] == [[png(i)] * has_image(i) for i in range(ROWS)]
    assert {row.part for row in rows} == {"sft"}
    assert {row.source_id for row in rows} == {"same"}
    assert len({row.place for row in rows}) == len({row_key(row) for row in rows}) == ROWS
    for row in rows:
        check_sample(row, 1000)


@pytest.mark.parametrize("group_rows", [1, 4, 5, 1000])
def test_groups_are_contiguous_bounded_and_jsonable(write, group_rows):
    source = open_source(DataSpec("sft", write()))
    groups = source.scan(group_rows)
    assert [group.start for group in groups] == [sum(g.rows for g in groups[:i]) for i in range(len(groups))]
    assert sum(group.rows for group in groups) == ROWS
    assert all(0 < group.rows <= group_rows for group in groups)
    assert sum(group.images for group in groups) == sum(map(has_image, range(ROWS)))
    assert all(group.characters > 0 for group in groups)
    assert [json.loads(json.dumps(group.locator)) for group in groups] == [group.locator for group in groups]
    assert source.scan(group_rows) == groups


def test_groups_can_be_read_in_any_order_by_another_source_and_by_threads(write):
    spec = DataSpec("sft", write())
    groups = open_source(spec).scan(4)
    expected = read_all(open_source(spec), groups)
    shuffled = random.Random(0).sample(groups, len(groups))
    assert read_all(open_source(spec), shuffled) == expected
    source = open_source(spec)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda group: list(source.read(group)), groups)) == list(expected.values())


def test_reading_half_a_group_and_again_is_harmless(write):
    source = open_source(DataSpec("sft", write()))
    group = source.scan(5)[1]
    first = next(iter(source.read(group)))
    assert next(iter(source.read(group))) == first
    assert len(list(source.read(group))) == group.rows


@pytest.mark.parametrize("limit", [0, 1, 7, 10, 12, ROWS, 1000])
def test_a_limit_keeps_the_first_rows(write, limit):
    path = write()
    whole = open_source(DataSpec("sft", path))
    everything = [row for group in whole.scan(4) for row in whole.read(group)]
    source = open_source(DataSpec("sft", path, limit=limit))
    assert [row for group in source.scan(4) for row in source.read(group)] == everything[:limit]


def test_the_fingerprint_changes_with_the_content_and_only_with_it(write):
    path = write()
    before = open_source(DataSpec("sft", path)).fingerprint()
    assert before["format"] == write.format
    assert [set(file) for file in before["files"]] == [{"name", "bytes", "sha256"}] * 2
    assert json.loads(json.dumps(before)) == before
    write()
    assert open_source(DataSpec("other", path, limit=3)).fingerprint() == before
    write("!")
    after = open_source(DataSpec("sft", path)).fingerprint()
    assert after["files"][0] != before["files"][0]
    assert after["files"][1] == before["files"][1]
