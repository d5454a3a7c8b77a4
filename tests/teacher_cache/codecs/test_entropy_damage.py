"""Damaged records: a CacheError or other symbols, never another exception, never much memory.

The coder has no checksum of its own. A flip in its words gives other symbols, most often noticed since the stream then does not end where
it should; what remains is caught before it gets here, by the crc32 of every tar member and the sha256 of every tar.
"""

from __future__ import annotations

import resource
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from teacher_cache.codecs import entropy, fitting
from teacher_cache.codecs.entropy import MOST_ROWS, MOST_SYMBOLS, Decoder, encode, open_record
from teacher_cache.codecs.entropy_tables import Table
from teacher_cache.errors import CacheError
from teacher_cache.fields import create_field
from teacher_cache.fields.affinity import VISION_ROWS
from teacher_cache.models.head import topk_rows
from teacher_cache.records import ImageLayout, TeacherOutput, View

V, D = 40, 6


def random(rows: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def spoken(seed: int, rows: int) -> TeacherOutput:
    """Rows alike (ids repeat), on a grid of one row's height where there are several."""
    hidden = {"vision": random(1, D, seed) + 0.1 * random(rows, D, seed + 1), "text": random(5, D, seed + 1000)}
    layout = (ImageLayout((rows, 1), (View((0, 0, rows, 1), (1, rows)),)),)
    return TeacherOutput(hidden, {"vision": topk_rows(hidden["vision"], random(V, D, 7), 4)}, layout=layout)


def fitted(name: str, **params: Any) -> Any:
    field = create_field(name, params)
    return field.with_calibration(field.fit([spoken(seed, 20) for seed in range(10)], random(V, D, 7)).tensors)


READERS: dict[str, Callable[[], Any]] = {
    "topk": lambda: fitted("vision_topk", k=4),
    "sketch": lambda: fitted("vision_hidden", codec="sketch"),
    "affinity": lambda: fitted("affinity", layout="factored", text="all"),
}


def test_the_records_have_everything_in_them() -> None:
    assert "table.near.0" in READERS["topk"]()._calibration, "ids as places in the row before"
    assert len(set(READERS["sketch"]()._calibration["classes"].flatten().tolist())) > 3, "bands of frequency"


def as_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)


def refused(field: Any, data: bytes) -> bool:
    """Decoded or refused; anything else fails the test."""
    try:
        field.decode({"coded": as_tensor(data), "text": torch.tensor([5], dtype=torch.int32)})
    except CacheError:
        return True
    return False


@pytest.mark.parametrize("kind", READERS)
def test_every_flip_and_every_cut(kind: str) -> None:
    field = READERS[kind]()
    unseen = []
    for rows in (1, 5):
        data = field.encode(None, spoken(99, rows))["coded"].numpy().tobytes()
        assert not refused(field, data)
        assert all(refused(field, data[:length]) for length in range(len(data)))
        assert refused(field, data + b"\0") and refused(field, data + b"\0\0\0\0")
        flips = [(at, bit) for at in range(len(data)) for bit in range(8)]
        unseen.append(sum(not refused(field, damaged(data, at, bit)) for at, bit in flips) / len(flips))
    # Numbers of a layout are whole bits under a uniform table: a flip there moves a grid and nothing else.
    assert max(unseen) <= 0.06


def damaged(data: bytes, at: int, bit: int) -> bytes:
    changed = bytearray(data)
    changed[at] ^= 1 << bit
    return bytes(changed)


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("rows", [2**32 - 1, 2**31, MOST_ROWS + 1, MOST_ROWS])
def test_a_header_that_asks_for_much_gets_nothing(kind: str, rows: int) -> None:
    field = READERS[kind]()
    data = field.encode(None, spoken(99, 5))["coded"].numpy().tobytes()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert refused(field, struct.pack("<I", rows) + data[4:])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "KiB: nothing near 2^32 rows"


def test_rows_times_rank_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """2^18 rows of rank 4,096 would be 4 GiB of floats, from a record of twelve bytes."""
    coder = fitting.fit(random(60, 8, 1), None, 0.1)
    monkeypatch.setattr(entropy, "MOST_SYMBOLS", 8000)
    empty = as_tensor(struct.pack("<III", 1001, 0, 0))
    with pytest.raises(CacheError, match="claims 8008 symbols"):
        coder.read({}, Decoder(empty))


def test_the_streams_of_a_record_share_the_bound() -> None:
    table = Table(0, torch.tensor([0.5, 0.5]))
    decoder = Decoder(encode([(np.zeros(1000, np.int32), table)], 3))
    with pytest.raises(CacheError, match="claims"):
        decoder.take(MOST_SYMBOLS + 1, table)
    decoder.take(1000, table)
    with pytest.raises(CacheError, match="claims"):
        decoder.take(MOST_SYMBOLS - 999, table)
    with pytest.raises(CacheError, match="claims"):
        decoder.take(-1, table)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "too short"),
        (b"\0" * 11, "too short"),
        (struct.pack("<III", 1, 2**32 - 1, 2**32 - 1), "length in its header"),
        (struct.pack("<III", 1, 0, 2) + struct.pack("<II", 5, 0), "an invalid end"),
    ],
)
def test_what_is_wrong_is_said(data: bytes, said: str) -> None:
    with pytest.raises(CacheError, match=said):
        Decoder(as_tensor(data))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8])
def test_records_of_another_type_or_name(dtype: torch.dtype) -> None:
    with pytest.raises(CacheError, match="too short"):
        Decoder(torch.zeros(40, dtype=dtype))
    with pytest.raises(CacheError, match=r"field x: a record holds \['rows'\], nothing coded"):
        open_record({"rows": torch.zeros(2)}, "field x")


def test_reading_too_much_is_noticed() -> None:
    """An empty coder would hand out first symbols for ever, and still be empty at the end."""
    table = Table(0, torch.tensor([0.5, 0.25, 0.25]))
    for count in (11, 12, 100, 10_000):
        decoder = Decoder(encode([(np.zeros(10, np.int32), table)], 0))
        with pytest.raises(CacheError, match=r"does not end where it should|lacks escaped"):
            decoder.take(count, table)
            decoder.finish()


def test_missing_escapes_are_noticed() -> None:
    table = Table(0, torch.tensor([0.5, 0.5]))
    data = encode([(np.array([0, 77, 0]), table)], 1).numpy().tobytes()
    without = struct.pack("<III", 1, 0, (len(data) - 16) // 4) + data[16:]
    with pytest.raises(CacheError, match="lacks escaped symbols"):
        Decoder(as_tensor(without)).take(3, table)


@pytest.mark.parametrize("kind", READERS)
def test_another_calibration_is_noticed(kind: str) -> None:
    """Same shapes, other rows: the tables differ, and the stream does not end where it should."""
    field = READERS[kind]()
    other = field.with_calibration(field.fit([spoken(seed, 20) for seed in range(40, 50)], random(V, D, 7)).tensors)
    noticed = [refused(other, field.encode(None, spoken(99 + i, 6))["coded"].numpy().tobytes()) for i in range(20)]
    assert all(noticed)


def test_the_calibration_of_another_kind_of_field_is_refused() -> None:
    sketch, topk = READERS["sketch"](), READERS["topk"]()
    record = {"coded": encode([], 0), "text": torch.tensor([0])}
    with pytest.raises(CacheError, match="lacks"):
        topk.with_calibration(sketch._calibration)
    for field in (sketch, READERS["affinity"]()):
        with pytest.raises(CacheError, match="lacks"):
            field.with_calibration(topk._calibration).encode(None, spoken(1, 2))
    assert len(topk.decode(record)) == 0


@pytest.mark.parametrize("vision", [-3, 0, 7, 2**31 - 1])
def test_affinity_with_an_impossible_number_of_vision_rows(vision: int) -> None:
    field = READERS["affinity"]()
    symbols = field._coder.quantise(random(6, D, 3))
    coded = encode([(np.array([vision]), VISION_ROWS), *field._coder.streams(symbols)], 6)
    with pytest.raises(CacheError, match="vision rows of 6"):
        field.decode({"coded": coded})


@pytest.mark.parametrize("stored", [{}, {"text": torch.tensor([-1])}, {"text": torch.tensor([2**40])}])
def test_affinity_without_vision_rows_of_an_impossible_width(stored: dict[str, torch.Tensor]) -> None:
    with pytest.raises(CacheError, match=r"without an image is damaged|text tokens are damaged"):
        READERS["affinity"]().decode({"coded": encode([], 0), **stored})
