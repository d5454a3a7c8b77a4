"""Bytes that a field's records will have, before any teacher exists.

Where shapes decide the bytes, the field itself is asked: it encodes tensors that have a shape and nothing else (the meta device), so a
new field or codec is counted exactly without a formula here. Where entropy decides them they are measured on another cache of the same
settings (``--like``), or guessed by the field from what was measured once (``field_defaults``).
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from statistics import NormalDist

import torch

from pipelines.judge.plan.field_defaults import default_basis, default_bytes, default_files
from teacher_cache.errors import KdcliError
from teacher_cache.fields import Field
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.records import Prepared, TeacherOutput, TextTokens
from teacher_cache.shards.commit import committed_shards
from teacher_cache.shards.index import Entry
from teacher_cache.signal_records import Sampled, TopK
from teacher_cache.wants import Wants

EXACT, MEASURED = "exact", "measured"
MOST_LIKE_SHARDS = 16
"""Shards of the other cache that are looked at: bytes a row settle after a few thousand rows."""
CODED_HEADER = 12
SCATTER = tuple(NormalDist(1.0, 0.1).inv_cdf((place + 0.5) / 8) for place in range(8))
"""Coded records beside the mean of their number of rows: 6 to 12 % (standard deviation) over the demo's fields."""
HEADER_BYTES = 80
"""Of a record with one tensor: for a field of which not even an empty record can be made here."""
LOOKS_AT_VALUES = (RuntimeError, NotImplementedError, AttributeError, TypeError, KeyError, ValueError)
"""What encoding a tensor without content ends in, where the field needs to see it."""
_DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class RowCounts:
    """Token rows of one sample, by kind."""

    vision: int
    response: int
    text: int


def record_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """Bytes of ``container.pack`` of tensors of these shapes, which may be on the meta device (to within the header's rounding to 8)."""
    header, at = {}, 0
    for name, one in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        end = at + one.numel() * one.element_size()
        header[name] = {"dtype": _DTYPES.get(one.dtype, "F32"), "shape": list(one.shape), "data_offsets": [at, end]}
        at = end
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + length + -length % 8 + at


def member_bytes(size: int) -> int:
    """Bytes of a tar that a member of ``size`` bytes takes: its header and whole blocks."""
    return tarfile.BLOCKSIZE * (1 - -size // tarfile.BLOCKSIZE)


def coded_rows(one: Field, counts: RowCounts) -> int:
    """Rows that a field's bytes are counted by, of one sample."""
    if own := getattr(one, "coded_rows", None):
        return int(own(counts.vision, counts.response, counts.text))
    return sum(getattr(counts, kind) for kind in one.wants.row_kinds)


@dataclass(frozen=True)
class FieldSize:
    """How large the records of one field are.

    Attributes:
        basis: ``EXACT``, ``MEASURED`` or one of ``field_defaults``. exact: bytes of a record by its rows, where that is known.
        per_row: part → bytes a stored row otherwise; "" for parts that are not named. empty: bytes of a record without rows.
        rows: ``coded_rows`` of the field, of one sample.
    """

    name: str
    basis: str
    rows: Callable[[RowCounts], int]
    exact: Callable[[RowCounts], int] | None = None
    per_row: Mapping[str, float] = field(default_factory=dict)
    empty: int = 0

    def record(self, part: str, counts: RowCounts) -> int:
        """Bytes of one sample's record."""
        if self.exact is not None:
            return self.exact(counts)
        return self.empty + round(self.rows(counts) * self.per_row.get(part, self.per_row[""]))

    def in_tar(self, part: str, counts: RowCounts) -> float:
        """Mean bytes of a tar that it takes: coded records of equally many rows differ, and so do the blocks that they fill."""
        size = self.record(part, counts)
        if self.exact is not None:
            return member_bytes(size)
        return sum(member_bytes(round(self.empty + (size - self.empty) * factor)) for factor in SCATTER) / len(SCATTER)


def size_field(one: Field, width: int, vocabulary: int, like: TeacherCache | None, heads: int = 1) -> FieldSize:
    """Args: width: D. vocabulary: V without padding rows. heads: of attention.

    Raises:
        KdcliError: neither shapes, ``like`` nor a default tell.
    """
    rows = partial(coded_rows, one)
    if not one.calibrated:
        probe = ShapeProbe(one, width, vocabulary)
        try:
            probe(RowCounts(4, 3, 5))
        except LOOKS_AT_VALUES:
            pass  # so its bytes depend on them
        else:
            return FieldSize(one.name, EXACT, rows, exact=probe)
    empty = empty_record(one, width, vocabulary)
    if like is not None and differs(like, one) is None:
        return FieldSize(one.name, MEASURED, rows, per_row=measure(like, one, empty), empty=empty)
    each = {"": default_bytes(one, vocabulary, heads)}
    return FieldSize(one.name, default_basis(one), rows, per_row=each, empty=empty)


def empty_record(one: Field, width: int, vocabulary: int) -> int:
    """Bytes of a record without rows: what every record has besides its rows."""
    if one.calibrated:
        return record_bytes({"coded": torch.empty(CODED_HEADER, dtype=torch.uint8, device="meta")})
    try:
        output = shapes_of(one.wants, RowCounts(0, 0, 0), width, vocabulary, "cpu")
        return record_bytes(one.encode(stand_in(RowCounts(0, 0, 0)), output))
    except LOOKS_AT_VALUES:
        return HEADER_BYTES


def differs(like: TeacherCache, one: Field) -> str | None:
    """Why bytes of ``like`` say nothing about this field; None where they do."""
    there = like.fields.get(one.name)
    if there is None:
        return f"{like.storage} has no {one.name}"
    if there["params"] != dict(one.params):
        return f"{like.storage} has {one.name} with {there['params']}, the plan has {dict(one.params)}"
    if not committed_shards(like.storage, f"fields/{one.name}"):
        return f"{like.storage} has no finished shard of {one.name}"
    return None


def measure(like: TeacherCache, one: Field, empty: int) -> dict[str, float]:
    """Bytes a stored row by part and (under "") over all, from the indices of a few shards. empty: bytes of a record without rows."""
    column = like.column(one.name)
    shards = committed_shards(like.storage, column.column)
    payload: dict[str, float] = {}
    rows: dict[str, int] = {}
    for shard in shards[:: -(-len(shards) // MOST_LIKE_SHARDS)]:
        for entry in column.entries(shard):
            stored = coded_rows(one, counts_of(entry))
            if not stored:
                continue
            size = sum(member.size for member in entry.members)
            for part in (like.plan.slices[shard].part, ""):
                payload[part] = payload.get(part, 0.0) + size - empty
                rows[part] = rows.get(part, 0) + stored
    if not rows:
        raise KdcliError(
            f"{like.storage}: no rows of {one.name} to measure: capture more rows there, or leave out --like"
        )
    return {part: payload[part] / rows[part] for part in rows}


def counts_of(entry: Entry) -> RowCounts:
    return RowCounts(entry.vision_rows, entry.response_rows, entry.text_tokens)


class ShapeProbe:
    """Bytes of a record by rows: the field encodes tensors without content."""

    def __init__(self, one: Field, width: int, vocabulary: int):
        self.field, self.width, self.vocabulary = one, width, vocabulary
        self._known: dict[RowCounts, int] = {}

    def __call__(self, counts: RowCounts) -> int:
        if counts not in self._known:
            output = shapes_of(self.field.wants, counts, self.width, self.vocabulary)
            self._known[counts] = record_bytes(self.field.encode(stand_in(counts), output))
        return self._known[counts]


def stand_in(counts: RowCounts) -> Prepared:
    """A row of so many tokens, its response ones together."""
    response = torch.arange(counts.text) < counts.response
    numbers = torch.zeros(counts.text, dtype=torch.uint8)
    text = TextTokens(numbers.to(torch.uint32), numbers, numbers.to(torch.uint16), response, ())
    nothing = torch.zeros(0, dtype=torch.int64)
    return Prepared("", "", nothing, nothing, nothing, nothing, nothing, text, (), {})


def shapes_of(wants: Wants, counts: RowCounts, width: int, vocabulary: int, device: str = "meta") -> TeacherOutput:
    """What the teacher would answer, as shapes."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def states(kind: str) -> torch.Tensor:
        return empty(rows[kind], width, dtype=torch.bfloat16)

    def entries(kind: str, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        k = min(k, vocabulary)
        return empty(rows[kind], k, dtype=torch.int64), empty(rows[kind], k), empty(rows[kind])

    rows = vars(counts)
    # Of any number of heads: a field of attention looks at values, and is asked for its empty record only.
    return TeacherOutput(
        hidden={kind: states(kind) for kind in wants.hidden},
        topk={kind: TopK(*entries(kind, k), empty(rows[kind])) for kind, k in wants.topk.items()},
        sampled={kind: Sampled(*entries(kind, one.size)) for kind, one in wants.sampled.items()},
        attention={layer: empty(1, counts.text, counts.vision) for layer in wants.attention},
        gram=empty(counts.vision, counts.vision) if wants.gram else None,
        features=states("vision") if wants.features else None,
        device=torch.device(device),
    )


def calibration_files(one: Field, width: int, vocabulary: int, like: TeacherCache | None) -> dict[str, int]:
    """Bytes of the files that a calibrated field writes once, by role: ``calibration``, ``low_rank_head``."""
    if like is not None and differs(like, one) is None:
        body = like.fields[one.name]
        roles = [role for role in ("calibration", "low_rank_head") if body.get(role)]
        return {role: like.storage.size(body[role]["path"]) for role in roles}
    return default_files(one, width, vocabulary)
