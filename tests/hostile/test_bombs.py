"""Small files that claim or unpack to gigabytes: refused with a reason, in bounded memory."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import zlib
from functools import cache
from pathlib import Path

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zstandard

from teacher_cache.codecs import container, frame
from teacher_cache.errors import CacheError, SkipSample
from teacher_cache.fields import create_field, decode_record
from teacher_cache.records import Image
from teacher_cache.samples import decode_sample
from teacher_cache.shards.index import SCHEMA, parse_index
from teacher_cache.sources.usable_samples import decode_image

LIMIT = 89_478_485
MOST_GROWTH = 200 << 20
"""Bytes by which the peak of a process may grow over all images, or all frames."""


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *more: bytes) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


def saved(kind: str, frames: int = 1) -> bytearray:
    stream = io.BytesIO()
    every = [PIL.Image.new("RGB", (8, 8), colour) for colour in ("black", "red", "blue")[:frames]]
    more = {"save_all": True, "append_images": every[1:]} if frames > 1 else {}
    every[0].save(stream, kind, **more)
    return bytearray(stream.getvalue())


def patched(kind: str, at: bytes | int, ahead: int, new: bytes, frames: int = 1) -> bytes:
    """A real file with the bytes ``ahead`` of a marker (or of a place) exchanged."""
    data = saved(kind, frames)
    start = (at if isinstance(at, int) else data.rindex(at)) + ahead
    data[start : start + len(new)] = new
    return bytes(data)


def tiled_tiff(side: int, tile: tuple[int, int]) -> bytes:
    strip = zlib.compress(b"\0" * 1000)
    tags = {256: side, 257: side, 258: 8, 259: 8, 262: 1, 277: 1, 322: tile[0], 323: tile[1], 324: 8, 325: len(strip)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    strip += b"\0" * (len(strip) % 2)
    return b"II*\0" + struct.pack("<I", 8 + len(strip)) + strip + struct.pack("<H", len(tags)) + entries + b"\0" * 4


def packed(megabytes: int) -> bytes:
    return zlib.compress(b"\0" * (megabytes << 20), 1)


@cache
def bombs() -> dict[str, bytes]:
    """Files whose picture, or whose memory, would be enormous."""
    wide = (20_000 - 1).to_bytes(3, "little")
    return {
        "png": png(50_000, 50_000),
        "png beyond any size": png(2**31 - 1, 2**31 - 1),
        "png just above the limit": png(9460, 9460),
        "jpeg": patched("JPEG", b"\xff\xc0", 5, struct.pack(">HH", 60_000, 60_000)),
        "webp canvas": patched("WEBP", b"VP8X", 12, wide * 2, frames=2),
        "gif": patched("GIF", 6, 0, struct.pack("<HH", 65_535, 65_535)),
        "gif, a frame beyond its screen": patched("GIF", b",\0\0\0\0", 5, struct.pack("<HH", 65_535, 65_535)),
        "bmp": patched("BMP", 18, 0, struct.pack("<ii", 60_000, 60_000)),
        "tiff tile": tiled_tiff(8, (65_536, 32_752)),
    }


@cache
def burdened() -> dict[str, bytes]:
    """Small pictures with something huge beside them."""
    return {
        "png profile": png(8, 8, chunk(b"iCCP", b"icc\0\0" + packed(16))),
        "png text": png(8, 8, chunk(b"zTXt", b"k\0\0" + packed(16))),
        "png texts": png(8, 8, *[chunk(b"zTXt", b"k\0\0" + zlib.compress(b"a" * 900_000, 1))] * 80),
        "many frames": bytes(saved("GIF", frames=3)),
    }


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", bombs())
def test_a_bomb_is_a_skip_with_a_reason(name: str) -> None:
    data = bombs()[name]
    assert len(data) < 1000
    with pytest.raises(SkipSample) as caught:
        decode_image(Image("a", data), LIMIT)
    assert caught.value.reason == "image_too_large"


@pytest.mark.filterwarnings("error")
def test_pillow_has_no_word_of_its_own() -> None:
    """Where it warns (89 million pixels) and where it refuses (179 million): a skip, even for who makes errors of warnings."""
    for side in (11_000, 14_000):
        with pytest.raises(SkipSample) as caught:
            decode_image(Image("a", png(side, side)), 1 << 40)
        assert caught.value.reason == "image_too_large"


@pytest.mark.parametrize("name", burdened())
def test_what_lies_beside_a_picture_costs_nothing(name: str) -> None:
    try:
        assert decode_image(Image("a", burdened()[name]), LIMIT).size == (8, 8)
    except SkipSample as skip:
        assert skip.reason == "image_corrupt" and name != "many frames"


def measured(code: str) -> int:
    """Bytes by which the peak of a fresh process grows while it runs the code, behind what it imports."""
    status = "next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmHWM'))"  # ru_maxrss begins with ours
    before = f"from {__name__} import *\npeak = lambda: {status}\n"
    script = f"{before}made = [*bombs().values(), *burdened().values()]\nfirst = peak()\n{code}\nprint(peak() - first)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    return int(done.stdout) << 10


def read_all_bombs(images: list[bytes]) -> None:
    """Called in a process of its own, whose memory is measured."""
    for data in images:
        try:
            decode_image(Image("a", data), LIMIT)
        except SkipSample:
            continue
    for data, most in (*frames(), (index_bomb("key"), 0), (index_bomb("ext"), 0)):
        try:
            frame.decompress(data, "here") if most else parse_index(data, "here", 1 << 40, ROWS)
        except CacheError:
            continue
        raise AssertionError("a bomb was read")


def test_the_memory_of_all_of_them() -> None:
    assert measured("read_all_bombs(made)") < MOST_GROWTH


# Frames and records of a cache


@cache
def frames() -> list[tuple[bytes, int]]:
    """(frame, bytes that it unpacks to): one that tells its length, one that tells another, one that tells none."""
    size = frame.MOST_BYTES + 1
    compressor = zstandard.ZstdCompressor(level=1)
    stream = compressor.compressobj(size=size)
    block = b"\0" * (1 << 20)
    honest = b"".join([*(stream.compress(block) for _ in range(size >> 20)), stream.compress(b"\0"), stream.flush()])
    silent = zstandard.ZstdCompressor(level=1, write_content_size=False).compressobj()
    silent_data = b"".join([*(silent.compress(block) for _ in range(64)), silent.flush()])
    liar = bytearray(compressor.compress(b"\0" * 300_000))
    at = liar.index(struct.pack("<I", 300_000))
    liar[at : at + 4] = struct.pack("<I", 2**31)
    return [(honest, size), (silent_data, 64 << 20), (bytes(liar), 300_000)]


def test_frames_are_refused_before_they_are_unpacked() -> None:
    said = []
    for data, _ in frames():
        with pytest.raises(CacheError, match="here: a compressed frame") as caught:
            frame.decompress(data, "here")
        said.append(str(caught.value))
    assert "at most" in said[0] and "without its length" in said[1] and "at most" in said[2]


def test_a_frame_that_holds_more_than_it_says() -> None:
    data = bytearray(zstandard.ZstdCompressor(level=1).compress(b"\0" * 300_000))
    at = data.index(struct.pack("<I", 300_000))
    data[at : at + 4] = struct.pack("<I", 1000)
    with pytest.raises(CacheError, match="here: a damaged compressed frame"):
        frame.decompress(bytes(data), "here")


def test_records_that_claim_more_than_they_can_hold() -> None:
    attention = create_field("attention")
    honest = torch.frombuffer(bytearray(frame.compress(b"\0" * 100)), dtype=torch.uint8)
    for shape in ([1 << 10, 1 << 10, 1 << 11], [2**31 - 1] * 3, [10, 10, 2], [-1, -1, 100]):
        record = container.pack({"coded": honest, "shape": torch.tensor(shape, dtype=torch.int32)})
        with pytest.raises(CacheError, match="here: "):
            decode_record(attention, record, "here")


ROWS = 20_000


@cache
def index_bomb(column: str) -> bytes:
    """A parquet index in which one text of 8 MB stands for the key, or the extension, of every row."""
    text = pa.DictionaryArray.from_arrays(pa.array([0] * ROWS, pa.int32()), pa.array(["k" * (8 << 20)]))
    numbers = pa.array(range(ROWS), pa.int64())
    narrow = numbers.cast(pa.int32())
    plain = pa.array([str(i) for i in range(ROWS)])
    members = [text if column == "ext" else plain, numbers, numbers, narrow.cast(pa.uint32())]
    inner = pa.StructArray.from_arrays(members, names=["ext", "offset", "size", "crc32"])
    listed = pa.ListArray.from_arrays(pa.array(range(ROWS + 1), pa.int32()), inner)
    every = [text if column == "key" else plain, numbers, narrow, narrow, narrow, listed]
    stream = io.BytesIO()
    pq.write_table(pa.table(every, names=SCHEMA.names), stream, compression="zstd", store_schema=False)
    return stream.getvalue()


@pytest.mark.parametrize("column", ["key", "ext"])
def test_an_index_that_would_write_a_text_out_for_every_row(column: str) -> None:
    data = index_bomb(column)
    assert len(data) < 600_000
    with pytest.raises(CacheError, match=r"here: damaged index .*a text of 8,388,608"):
        parse_index(data, "here", 1 << 40, ROWS)


def test_an_index_of_more_rows_than_its_commit_says() -> None:
    with pytest.raises(CacheError, match="20000 samples, not 3"):
        parse_index(index_bomb("key"), "here", 1 << 40, 3)


def test_a_layout_that_nobody_could_count_through() -> None:
    from benchmarks.fuzz_targets import sample_members

    members = sample_members()
    body = json.loads(members["json"])
    body["layout"][0]["views"][0]["grid"] = [1 << 40, 1 << 20]
    with pytest.raises(CacheError, match="here: not a sample record"):
        decode_sample({**members, "json": json.dumps(body).encode()}, "here")
