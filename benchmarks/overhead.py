"""What does a cached sample cost on disk at real token counts, field by field, and how much of it is tar?

Rows of four demo pictures (4 × 144 = 576 vision tokens) with captions and questions until the answers have about 200 tokens, captured by
the demo's trained teacher with the ``standard`` profile, and once more with the affinity as a ``dense`` matrix.

    python -m benchmarks.overhead [--rows 96] [--save]

Payload: the numbers themselves (bytes of tensors, images, json). Tar overhead: headers of 512 bytes, padding to 512, the end of the file.
The safetensors header of each member is counted beside it. Columns "at 1,300": the end of the file spread over as many rows as a shard of
665,000 rows in 512 shards has. Target: tar overhead at most 5 % of the payload of the whole standard cache, with and without ``samples``.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import struct
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.common import DEMO_MODELS, finish, machine, print_table
from benchmarks.demo_training.tokenizer import load_tokenizer
from pipelines.capture.cache_teacher import capture
from pipelines.capture.worker import CaptureRequest
from pipelines.demo.questions import CAPTION_REQUESTS, QuestionTurn, caption, image_turns
from pipelines.demo.render import render
from pipelines.demo.scenes import sample_scene
from pipelines.demo.world import WorldRow
from pipelines.settings import CaptureSettings
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.sources import DataSpec
from teacher_cache.teachers.transformers import TeacherSpec

TARGET = 0.05
PICTURES, RESPONSE_TOKENS = 4, 200
SHARD_ROWS = 1300
DENSE = "affinity (dense)"


def write_rows(folder: Path, rows: int) -> Path:
    """LLaVA json of rows with several pictures."""
    folder.mkdir(parents=True)
    listed = []
    for number, row in enumerate(long_rows(rows)):
        names = [f"{number:06d}-{i}.png" for i in range(len(row.scenes))]
        for name, scene in zip(names, row.scenes):
            buffer = io.BytesIO()
            render(scene).save(buffer, format="PNG")
            (folder / name).write_bytes(buffer.getvalue())
        listed.append({"id": row.id, "image": names, "conversations": row.conversations})
    path = folder / "rows.json"
    path.write_text(json.dumps(listed))
    return path


def long_rows(count: int) -> Iterator[WorldRow]:
    """A caption of every picture, then questions about them in turn, up to ``RESPONSE_TOKENS`` in the answers."""
    rng = random.Random("overhead")
    tokenizer = load_tokenizer()
    for number in range(count):
        scenes = tuple(sample_scene(rng, "train") for _ in range(PICTURES))
        every = [QuestionTurn(rng.choice(CAPTION_REQUESTS), caption(scene), "caption") for scene in scenes]
        asked = [turn for scene in scenes for turn in image_turns(scene, rng, 40)]
        rng.shuffle(asked)
        turns, tokens = [], 0
        for turn in (*every, *asked):
            if tokens >= RESPONSE_TOKENS:
                break
            turns.append(turn)
            tokens += len(tokenizer(turn.answer)["input_ids"]) + 1  # the end-of-turn token is an answer's too
        yield WorldRow(f"long-{number:06d}", scenes, tuple(turns))


def column_sizes(cache: TeacherCache, name: str) -> dict[str, float]:
    """Bytes a sample of one column: payload, safetensors headers, tar headers with padding, and the end of each tar."""
    reader = cache.column(name)
    payload = containers = members = tar = rows = stops = 0
    for shard in cache.shards(cache.parts()):
        entries = reader.entries(shard)
        rows += len(entries)
        tar += reader.commit(shard).tar_bytes
        stops += max(-(-(one.offset + one.size) // 512) * 512 for entry in entries for one in entry.members)
        for row in range(len(entries)):
            for extension, data in reader.read(shard, row).items():
                header = 8 + struct.unpack("<Q", data[:8])[0] if extension.endswith("safetensors") else 0
                members, containers, payload = members + len(data), containers + header, payload + len(data) - header
    sizes = {
        "payload": payload / rows,
        "safetensors": containers / rows,
        "headers and padding": (stops - members) / rows,
        "end": (tar - stops) / rows,
        "end at 1,300": (tar - stops) / len(cache.shards(cache.parts())) / SHARD_ROWS,
    }
    return {**sizes, "tar": tar / rows}


def with_shares(sizes: dict[str, float]) -> dict[str, float]:
    """Tar overhead (all that is tar's own) as shares of the payload."""
    own = sizes["headers and padding"]
    return {
        **{name: round(value, 1) for name, value in sizes.items()},
        "overhead": round((own + sizes["end"]) / sizes["payload"], 4),
        "overhead at 1,300": round((own + sizes["end at 1,300"]) / sizes["payload"], 4),
        "and safetensors": round((own + sizes["end at 1,300"] + sizes["safetensors"]) / sizes["payload"], 4),
    }


def total(columns: dict[str, dict[str, float]], names: Sequence[str]) -> dict[str, float]:
    return with_shares({key: sum(columns[name][key] for name in names) for key in columns[names[0]]})


def rows_of_kind(name: str, counts: dict[str, float]) -> float:
    """Rows a sample that a column describes: an affinity's are its vision and text states."""
    if name.startswith("affinity"):
        return counts["vision_rows"] + counts["text_tokens"]
    return counts.get(f"{name.split('_')[0]}_rows", 1.0)


def measure(models: Path, folder: Path, rows: int, calibration_rows: int) -> dict[str, Any]:
    data = DataSpec("sft", str(write_rows(folder / "world", rows)), image_root=str(folder / "world"), template="chat")
    settings = CaptureSettings(shards=1, max_length=2048, workers=1, calibration_rows=calibration_rows)
    teacher = TeacherSpec(str(models / "teacher"), dtype="float32", device="cpu")
    capture(CaptureRequest(teacher, (data,), str(folder / "standard"), settings, {}))
    dense = replace(settings, fields=("affinity",))
    capture(CaptureRequest(teacher, (data,), str(folder / "dense"), dense, {"affinity": {"layout": "dense"}}))
    cache = TeacherCache(str(folder / "standard"))
    fields = sorted(cache.fields)
    columns = {name: column_sizes(cache, name) for name in ("samples", *fields)}
    columns[DENSE] = column_sizes(TeacherCache(str(folder / "dense")), "affinity")
    commit = cache.column("samples").commit(0)
    counts = {name: count / commit.written for name, count in commit.counts.items()}
    others = [name for name in fields if name != "affinity"]
    return {
        "rows": commit.written,
        "a_row": {name: round(count, 1) for name, count in counts.items()},
        "columns": {
            name: {
                **with_shares(one),
                "payload a row of its kind": round(one["payload"] / rows_of_kind(name, counts), 2),
            }
            for name, one in columns.items()
        },
        "totals": {
            "standard, fields only": total(columns, fields),
            "standard, with samples": total(columns, ["samples", *fields]),
            "dense affinity, fields only": total(columns, [*others, DENSE]),
            "dense affinity, with samples": total(columns, ["samples", *others, DENSE]),
        },
    }


def report(body: dict[str, Any]) -> None:
    print(", ".join(f"{name} {count:g}" for name, count in body["a_row"].items()), "a sample\n")
    keys = ("payload", "safetensors", "headers and padding", "end", "tar")
    shares = ("overhead", "overhead at 1,300", "and safetensors")
    lines = []
    for name, one in {**body["columns"], **body["totals"]}.items():
        per_row = f"{one['payload a row of its kind']:.1f}" if "payload a row of its kind" in one else ""
        lines.append((name, *(f"{one[key]:.0f}" for key in keys), per_row, *(f"{one[key]:.1%}" for key in shares)))
    print_table(("bytes a sample", *keys, "payload/row", *shares), lines)
    print()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=str(DEMO_MODELS), help="folder of teacher/")
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--calibration-rows", type=int, default=64)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/overhead-<machine>.json")
    options = parser.parse_args(arguments)
    described = machine("cpu")
    with tempfile.TemporaryDirectory() as folder:
        body = measure(Path(options.models), Path(folder), options.rows, options.calibration_rows)
    body = {"machine": described, "shapes": "demo", "shard_rows": SHARD_ROWS, "target": TARGET, **body}
    report(body)
    finish("overhead", body, options.save)


if __name__ == "__main__":
    main()
