"""Writes the demo world in the formats that real mixtures have: LLaVA-1.5 json and LLaVA-NeXT parquet.

``python -P -m pipelines.demo.write_world FOLDER --captions 500 --train 2000 --heldout 350``
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.demo.defects import Injector, WrittenRow
from pipelines.demo.render import render
from pipelines.demo.world import WorldRow, caption_rows, heldout_rows, train_rows
from pipelines.demo.wrong_answers import WrongAnswers

TRAIN_FORMATS = ("parquet", "llava-json")
NEXT_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("conversations", pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))),
        ("data_source", pa.string()),
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
    ]
)


@dataclass(frozen=True)
class WorldPaths:
    """Where everything is. ``train`` is a json file or a ``train/*.parquet`` glob."""

    folder: Path
    captions: Path
    train: str
    heldout: Path
    images: Path  # image root of the json files
    defects: dict[str, list[int]] = field(default_factory=dict)  # kind -> row numbers of the train split
    wrong: list[dict[str, Any]] = field(
        default_factory=list
    )  # as ``WrongAnswers.done``; also in ``wrong_answers.json``
    answers: int = 0  # of the train split, wrong ones among them


def write_world(
    folder: Path,
    *,
    captions: int,
    train: int,
    heldout: int,
    seed: int,
    train_format: str = "parquet",
    defects: int = 0,
    two_image_share: float = 0.0,
    wrong_answers: float = 0.0,
) -> WorldPaths:
    """Writes ``captions.json``, ``train/*.parquet`` (or ``train.json``), ``heldout.json`` and ``images/``.

    ``defects`` rows of the train split are damaged on purpose, and a share of its answers is made wrong (``wrong_answers``,
    listed in ``wrong_answers.json``); captions and held-out rows are clean. Two-picture rows exist only as ``llava-json``:
    a LLaVA-NeXT row has one image. Equal arguments give equal bytes.
    """
    if train_format not in TRAIN_FORMATS:
        raise ValueError(f"train_format {train_format!r}: choose one of {', '.join(TRAIN_FORMATS)}")
    if two_image_share and train_format == "parquet":
        raise ValueError("two_image_share: LLaVA-NeXT parquet holds one image a row; use train_format='llava-json'")
    folder = Path(folder)
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    injector = Injector(train, defects, seed)
    wrong = WrongAnswers(wrong_answers, seed)
    rows = enumerate(map(_written, wrong.apply(train_rows(train, seed, two_image_share))))
    damaged = (injector.apply(i, row) for i, row in rows)
    if train_format == "parquet":
        train_path = _write_parquet(folder / "train", damaged, train)
    else:
        train_path = str(_write_json(folder / "train.json", images, damaged))
    captions_path = _write_json(folder / "captions.json", images, map(_written, caption_rows(captions, seed)))
    heldout_path = _write_json(folder / "heldout.json", images, map(_written, heldout_rows(heldout, seed)))
    (folder / "wrong_answers.json").write_text(json.dumps(wrong.done, indent=1) + "\n")
    return WorldPaths(folder, captions_path, train_path, heldout_path, images, injector.done, wrong.done, wrong.answers)


def _written(row: WorldRow) -> WrittenRow:
    pictures = []
    for scene in row.scenes:
        buffer = io.BytesIO()
        render(scene).save(buffer, format="PNG")
        pictures.append(buffer.getvalue())
    return WrittenRow(row.id, row.conversations, row.source, tuple(pictures), row.family)


def _write_json(path: Path, images: Path, rows: Iterator[WrittenRow]) -> Path:
    """LLaVA-1.5: one json list; pictures under ``images/<split>/``, paths relative to ``images``."""
    (images / path.stem).mkdir(exist_ok=True)
    listed = []
    for index, row in enumerate(rows):
        names = []
        for i, data in enumerate(row.images):
            names.append(f"{path.stem}/{index:06d}{'ab'[i] if len(row.images) > 1 else ''}.png")
            if data is not None:
                (images / names[-1]).write_bytes(data)
        image = {"image": names[0] if len(names) == 1 else names} if names else {}
        family = {"family": row.family} if row.family else {}
        listed.append({"id": row.id, **image, **family, "conversations": row.conversations})
    path.write_text(json.dumps(listed, indent=1) + "\n")
    return path


def _write_parquet(folder: Path, rows: Iterator[WrittenRow], count: int) -> str:
    """LLaVA-NeXT: two files of several row groups each; returns the glob."""
    folder.mkdir(exist_ok=True)
    group = max(1, min(200, -(-count // 8)))
    per_file = -(-count // 2)
    for part in range(2):
        chunk = itertools.islice(rows, per_file)
        with pq.ParquetWriter(folder / f"train-{part:05d}-of-00002.parquet", NEXT_SCHEMA) as writer:
            while batch := list(itertools.islice(chunk, group)):
                writer.write_table(pa.Table.from_pylist([_next_row(row) for row in batch], NEXT_SCHEMA))
    return str(folder / "*.parquet")


def _next_row(row: WrittenRow) -> dict:
    image = None
    if row.images and row.images[0] is not None:
        image = {"bytes": row.images[0], "path": f"{row.id}.png"}
    return {"id": row.id, "conversations": row.conversations, "data_source": row.source, "image": image}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--captions", type=int, default=500)
    parser.add_argument("--train", type=int, default=2000)
    parser.add_argument("--heldout", type=int, default=350)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train-format", choices=TRAIN_FORMATS, default="parquet")
    parser.add_argument("--defects", type=int, default=0, help="damage this many train rows on purpose")
    parser.add_argument("--two-image-share", type=float, default=0.0, help="of the train rows (llava-json only)")
    parser.add_argument("--wrong-answers", type=float, default=0.0, help="share of the train answers, 0 to 1")
    paths = write_world(**vars(parser.parse_args()))
    for name in ("captions", "train", "heldout", "images"):
        print(f"{name:9s} {getattr(paths, name)}")
    if paths.wrong:
        print(f"wrong     {len(paths.wrong)} answers: {paths.folder / 'wrong_answers.json'}")
    if paths.defects:
        print("defects   " + ", ".join(f"{kind}: rows {rows}" for kind, rows in paths.defects.items()))


if __name__ == "__main__":
    main()
