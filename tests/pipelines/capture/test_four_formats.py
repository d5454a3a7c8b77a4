"""One mixture of all four formats: the same rows give the same keys, tokens and teacher's signals, whatever file they came in."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipelines.capture.cache_teacher import capture
from pipelines.judge.doctor import examine
from teacher_cache.errors import CompatibilityError
from teacher_cache.planning.make_plan import make_plan
from teacher_cache.planning.plan import difference
from teacher_cache.planning.plan_file import parse_plan
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.reading.cached_samples import CachedSamples
from teacher_cache.sources import DataSpec

ROWS, LIMIT = 6, 5
FORMATS = ("llava-json", "llava-next-parquet", "messages-jsonl", "webdataset")
PATHS = {"llava-json": "a.json", "llava-next-parquet": "a.parquet", "messages-jsonl": "a.jsonl", "webdataset": "a.tar"}


def png(i: int) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (96, 96), (40 * i, 200 - 30 * i, 90)).save(buffer, "png")
    return buffer.getvalue()


def has_image(i: int) -> bool:
    return i % 3 != 2


def talk(i: int) -> list[tuple[str, str]]:
    """Row 3 has no answer: a skip in every format, for the same reason."""
    answer = "" if i == 3 else f"answer {i} é"
    return [
        ("user", "<image>\n" * has_image(i) + f"question {i}"),
        ("assistant", answer),
        ("user", "more?"),
        ("assistant", "no"),
    ]


def llava(i: int) -> list[dict[str, str]]:
    return [{"from": {"user": "human", "assistant": "gpt"}[role], "value": text} for role, text in talk(i)]


def message(role: str, text: str) -> dict[str, Any]:
    if not text.startswith("<image>"):
        return {"role": role, "content": text}
    return {"role": role, "content": [{"type": "image"}, {"type": "text", "text": text.removeprefix("<image>\n")}]}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[DataSpec, ...]:
    folder: Path = tmp_path_factory.mktemp("formats")
    rows, lines, table = [], [], []
    with tarfile.open(folder / "a.tar", "w") as tar:
        for i in range(ROWS):
            picture = {"image": f"{i}.png"} if has_image(i) else {}
            (folder / f"{i}.png").write_bytes(png(i))
            rows.append({"id": i, "conversations": llava(i), **picture})
            lines.append({"id": i, "messages": [message(*turn) for turn in talk(i)], **picture})
            image = {"bytes": png(i), "path": f"{i}.png"} if has_image(i) else None
            table.append({"id": str(i), "conversations": llava(i), "image": image})
            for name, content in [
                (f"{i}.json", json.dumps({"conversations": llava(i)}).encode()),
                (f"{i}.png", png(i)),
            ]:
                if name.endswith("json") or has_image(i):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    (folder / "a.json").write_text(json.dumps(rows))
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    pq.write_table(pa.Table.from_pylist(table), folder / "a.parquet")
    return tuple(DataSpec(name, str(folder / PATHS[name]), limit=LIMIT) for name in FORMATS)


def test_the_doctor_says_the_same_of_every_format(data: tuple[DataSpec, ...]) -> None:
    for part in examine(list(data), workers=1).parts:
        assert (part.rows, part.usable, part.with_images, part.multi_turn) == (LIMIT, LIMIT - 1, 3, LIMIT - 1), (
            part.part
        )
        assert {kind: found.count for kind, found in part.defects.items()} == {"empty_answer": 1}


def test_a_template_that_the_teacher_cannot_read_is_told_before_anything_is_written(
    data: tuple[DataSpec, ...], make_request: Any, tmp_path: Path
) -> None:
    with pytest.raises(CompatibilityError, match="template 'v1' needs </s> as one token"):
        capture(make_request(tmp_path / "cache", data=[replace(data[0], template="v1")]))
    assert not (tmp_path / "cache").exists()


def test_a_plan_is_bound_to_what_a_template_writes(data: tuple[DataSpec, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    specs = [replace(data[0], part=name, template=name) for name in ("chat", "v1")]
    before = make_plan(specs, 2, {}, 0, image_tokens=36)
    assert parse_plan(before.to_bytes(), "here") == before
    assert [part.fingerprint.get("template", {}).get("name") for part in before.parts] == [None, "v1"]
    monkeypatch.setattr("teacher_cache.preparing.templates.V1_SYSTEM", "Another sentence.")
    after = make_plan(specs, 2, {}, 0, image_tokens=36)
    (line,) = difference(before.identity(), after.identity())
    assert line.startswith("parts.v1.data.template.sha256: cache ")


def test_the_same_signals_from_every_format(data: tuple[DataSpec, ...], make_request: Any, tmp_path: Path) -> None:
    fields = ("response_topk", "vision_topk")
    summary = capture(make_request(tmp_path / "cache", data=data, shards=4, fields=fields))
    assert summary["rows"] == LIMIT * len(FORMATS)
    cache = TeacherCache(str(tmp_path / "cache"))
    assert sorted(cache.parts()) == sorted(FORMATS)
    by_part: dict[str, dict[int, Any]] = {}
    for part in FORMATS:
        rows = CachedSamples(cache, [part], list(fields))
        every = [rows.read(position, i) for position, count in enumerate(rows.counts) for i in range(count)]
        by_part[part] = {row.sample.ordinal: row for row in every}
        assert set(by_part[part]) == {0, 1, 2, 4}
    for part in FORMATS[1:]:
        for ordinal, expected in by_part[FORMATS[0]].items():
            row = by_part[part][ordinal]
            assert row.key == expected.key
            assert row.sample.turns == expected.sample.turns
            assert [one.data for one in row.sample.images] == [one.data for one in expected.sample.images]
            assert torch.equal(row.text.ids, expected.text.ids)
            assert row.layout == expected.layout
            for field in fields:
                torch.testing.assert_close(
                    row.fields[field].log_probs, expected.fields[field].log_probs, atol=1e-4, rtol=0
                )
                torch.testing.assert_close(
                    row.fields[field].log_tail, expected.fields[field].log_tail, atol=1e-3, rtol=0
                )
