"""A number a row from outside of the cache's fields: of a column of the mixture, which ``samples`` keeps, or of a file by the row's key.

A file may also have a list for a row, a number for each of its answers (``kdcli doctor --cache … --weights`` writes such a file).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from teacher_cache.errors import KdcliError, one_line
from teacher_cache.reading.cached_samples import CachedSample
from teacher_cache.records import TextTokens

LARGEST = 1e30
"""Of weights: their sums stay float32."""
Weight = float | tuple[float, ...]
"""Of a row, or of each of its answers in turn."""


@dataclass(frozen=True)
class Column:
    """text: as it was named. name: of the column. values: by row key, of a file; None: of the mixture. sha256: of the file."""

    text: str
    name: str
    values: Mapping[str, Weight] | None = None
    sha256: str = ""

    def of(self, row: CachedSample) -> Weight:
        """KdcliError naming a row that has no number there, one below 0, or a list of another length than it has answers."""
        place = f"row {row.key} ({row.sample.place})"
        if self.values is not None:
            if row.key not in self.values:
                raise KdcliError(f"{self.text}: no number for {place}")
            value, answers = self.values[row.key], len(answer_lengths(row.text))
            if isinstance(value, tuple) and len(value) != answers:
                raise KdcliError(f"{self.text}: {len(value)} numbers for {place}, which has {answers} answers")
            return value
        if self.name not in row.sample.extra:
            has = ", ".join(sorted(row.sample.extra)) or "none"
            raise KdcliError(
                f"{place}: its mixture has no column {self.name} there, which select = {self.text!r} weighs by; it has {has}"
            )
        return weight_of(row.sample.extra[self.name], f"{place}: column {self.name}")

    def check(self, keys: Iterable[str], where: str) -> None:
        """KdcliError where the file lacks one of these keys, or has nothing but zeros for them."""
        assert self.values is not None
        largest, missing, first = 0.0, 0, ""
        for key in keys:
            value = self.values.get(key)
            if value is None:
                missing, first = missing + 1, first or key
            largest = max(largest, *(value if isinstance(value, tuple) else (value or 0.0,)), 0.0)
        if missing:
            raise KdcliError(
                f"{self.text}: no number for {missing:,} rows of {where}, the first is {first}: the file needs a line for the key of every "
                "row (`kdcli cache inspect` shows one)"
            )
        if not largest:
            raise KdcliError(f"{self.text}: the weight of every row of {where} is 0: nothing would be learned")


def answer_lengths(text: TextTokens) -> list[int]:
    """Response tokens of each answer, in turn."""
    return text.turn[text.response].to(torch.int64).unique_consecutive(return_counts=True)[1].tolist()


def weight_of(value: Any, place: str) -> float:
    """KdcliError where a value is no weight."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= LARGEST:
        raise KdcliError(f"{place} holds {value!r:.40}: a weight is a number from 0 to {LARGEST:g}")
    return float(value)


def read_column(text: str, place: str) -> Column:
    """``column:NAME``, or ``file:PATH:NAME`` with all that the file says; KdcliError naming ``place``, file and row."""
    kind, _, rest = text.partition(":")
    if kind == "column":
        return Column(text, rest)
    path, colon, name = rest.rpartition(":")
    if not colon or not path or not name:
        raise KdcliError(f"{place}: write file:PATH:NAME, NAME being the column of the weights")
    file = Path(path)
    read = READERS.get(file.suffix.lower())
    if read is None or not file.is_file():
        wrong = "no such file" if read else f"a file of weights ends in {' or '.join(READERS)}"
        raise KdcliError(f"{place}: {path}: {wrong}")
    values: dict[str, Weight] = {}
    for number, (key, value) in enumerate(read(file, name), start=1):
        if not isinstance(key, str) or key in values:
            raise KdcliError(f"{path} row {number}: key {key!r} is {'there twice' if key in values else 'no text'}")
        where = f"{path} row {number}: {name}"
        values[key] = (
            tuple(weight_of(one, where) for one in value) if isinstance(value, list) else weight_of(value, where)
        )
    return Column(text, name, values, sha256_of(file))


def sha256_of(file: Path) -> str:
    import hashlib

    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _of_parquet(file: Path, name: str) -> Iterator[tuple[Any, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as opened:
            has = opened.schema_arrow.names
            if lacking := [one for one in ("key", name) if one not in has]:
                raise KdcliError(f"{file} has no column {', '.join(lacking)}; it has {', '.join(has[:20])}")
            for batch in opened.iter_batches(columns=["key", name]):
                yield from zip(*(batch.column(one).to_pylist() for one in ("key", name)))
    except (pa.ArrowException, OSError) as error:
        raise KdcliError(f"{file}: cannot be read as parquet ({one_line(error)[:200]})") from None


def _of_jsonl(file: Path, name: str) -> Iterator[tuple[Any, Any]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                yield row["key"], row[name]
            except (ValueError, TypeError, RecursionError):
                raise KdcliError(f"{file} line {number}: no JSON object") from None
            except KeyError as error:
                raise KdcliError(f"{file} line {number}: no {error.args[0]}") from None


READERS = {".parquet": _of_parquet, ".jsonl": _of_jsonl}
