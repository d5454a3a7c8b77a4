"""Writes ``tests/golden/cache``: one shard of ``samples`` and of two fields, from integers alone, so every machine makes the same.

``python tests/golden/make_golden.py FOLDER``. Run it again only for a new format version, into a folder of its own: the old
golden cache stays, and must stay readable or be refused by name.
"""

from __future__ import annotations

import hashlib
import struct
import sys
import zlib
from pathlib import Path

import torch

from teacher_cache.codecs import container
from teacher_cache.fields import create_field
from teacher_cache.fields.topk_plain import NAMES, PlainTopK
from teacher_cache.planning.plan import Part, Plan, Slice
from teacher_cache.planning.plan_file import write_plan
from teacher_cache.records import (
    Image,
    ImageLayout,
    Prepared,
    RowGroup,
    Sample,
    SkipRecord,
    TeacherOutput,
    TextTokens,
    Turn,
    View,
)
from teacher_cache.samples import encode_sample
from teacher_cache.shards.sealed import seal
from teacher_cache.shards.storage import Storage
from teacher_cache.shards.writer import ShardWriter
from teacher_cache.signal_records import TopK

ROWS, VISION, WIDTH, K = 4, 4, 6, 3
TOPK = {"k": K, "coding": "plain", "step": 1 / 64, "value_dtype": "float32"}


class PlainTopKWriter(PlainTopK):
    """What wrote top-k as plain tensors; kdcli itself only reads them."""

    def encode(self, prepared: Prepared, output: TeacherOutput) -> dict[str, torch.Tensor]:
        topk = output.topk[self.name.removesuffix("_topk")]
        dtype = getattr(torch, self.params["value_dtype"])
        return dict(zip(NAMES, (topk.ids.to(torch.int32), topk.log_probs.to(dtype), topk.log_tail, topk.log_z)))


def png(number: int) -> bytes:
    """A 1x1 picture, every chunk by hand: encoders change with their versions."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    pixel = b"\x78\x01\x01\x04\x00\xfb\xff" + bytes((0, number, 2, 3))
    pixel += struct.pack(">I", zlib.adler32(bytes((0, number, 2, 3))))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", pixel) + chunk(b"IEND", b"")


def sample(ordinal: int) -> Sample:
    image = ordinal != 2
    turns = (Turn("user", "<image>\n" * image + f"question {ordinal} é"), Turn("assistant", f"answer {ordinal}"))
    pictures = (Image(f"{ordinal}.png", png(ordinal)),) if image else ()
    return Sample("sft", ordinal, f"id-{ordinal}", f"rows.json row {ordinal}", turns, pictures, {"family": "golden"})


def prepared(ordinal: int) -> Prepared:
    vision = VISION if ordinal != 2 else 0
    ids = torch.arange(10 * ordinal, 10 * ordinal + 6)
    response = torch.tensor([False, False, False, True, True, True])
    text = TextTokens(
        ids.to(torch.uint32),
        torch.tensor([1, 1, 1, 2, 2, 2], dtype=torch.uint8),
        torch.tensor([0, 0, 0, 1, 1, 1], dtype=torch.uint16),
        response,
        (1,) * bool(vision),
    )
    input_ids = torch.cat([ids[:1], torch.full((vision,), 5), ids[1:]])
    at = torch.tensor([0, *range(1 + vision, 6 + vision)])
    layout = (ImageLayout((1, 1), (View((0, 0, 1, 1), (2, 2)),)),) * bool(vision)
    labels_at = at[response]
    key = f"{ordinal:09d}-{hashlib.sha256(str(ordinal).encode()).hexdigest()[:8]}"
    where = torch.arange(1, 1 + vision)
    return Prepared(key, "sft", input_ids, where, at, labels_at - 1, input_ids[labels_at], text, layout, {}, 2)


def output(ordinal: int, vision: int) -> TeacherOutput:
    """Multiples of 1/8: exact in float32, and no sum or exponential is taken."""
    values = torch.arange(vision * WIDTH, dtype=torch.float32).reshape(vision, WIDTH) * 0.125 - ordinal
    ids = torch.arange(3 * K).reshape(3, K) + ordinal
    scalars = torch.tensor([-1.5, -2.25, -4.0]) - ordinal
    log_probs = torch.tensor([[-0.5, -2.0, -3.0]]).repeat(3, 1) - torch.arange(3)[:, None] * 0.25
    return TeacherOutput({"vision": values}, {"response": TopK(ids, log_probs, scalars, scalars + 9)})


def plan() -> Plan:
    from teacher_cache.sources import DataSpec

    files = [{"name": "rows.json", "bytes": 1234, "sha256": "0123456789abcdef" * 4}]
    part = Part(DataSpec("sft", "rows.json", image_root="images"), {"format": "llava-json", "files": files}, ROWS + 1)
    group = RowGroup(0, ROWS + 1, {"file": 0, "offset": 3, "bytes": 900, "row": 0}, 120, 4)
    return Plan((part,), (Slice("sft", (group,)),), {"max_length": 2048, "over_length": "skip"}, 0)


def make_golden(folder: Path) -> None:
    storage = Storage(folder)
    made = plan()
    write_plan(storage, made)
    hashes = {"samples": ""}
    fields = {
        "fields/response_topk": PlainTopKWriter("response_topk", TOPK),
        "fields/vision_hidden": create_field("vision_hidden", {"codec": "int8", "codec_version": 1}),
    }
    for column, field in fields.items():
        body = {"field": field.name, "version": field.version, "params": dict(field.params)}
        teacher = {"plan_hash": made.plan_hash, "teacher": {}, "teacher_folder": "teacher/0", "head_sha256": None}
        data = seal({**body, **teacher})
        storage.put_new(f"{column}/field.json", data)
        hashes[column] = hashlib.sha256(data).hexdigest()
    skip = SkipRecord("sft", ROWS, "id-4", "rows.json row 4", "image_missing", "'4.png' has no bytes")
    for column, column_hash in hashes.items():
        writer = ShardWriter(storage, column, 0, made.plan_hash, column_hash)
        for ordinal in range(ROWS):
            row = prepared(ordinal)
            if column == "samples":
                writer.add(row, encode_sample(sample(ordinal), row))
            else:
                record = fields[column].encode(row, output(ordinal, len(row.vision_positions)))
                writer.add(row, {container.EXTENSION: container.pack(record)})
        writer.skip(skip)
        writer.commit()
    (folder / ".staging").rmdir()


if __name__ == "__main__":
    make_golden(Path(sys.argv[1]))
