"""The rows that every family reads: a square, a wide and a tall picture, two pictures in a row, none at all, and captions."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

SIZES = {"square": (48, 48), "wide": (96, 40), "tall": (32, 88)}
CHAT: list[tuple[tuple[str, ...], list[str]]] = [
    (("square",), ["<image>\nwhat colour is it?", "the circle is red"]),
    (("wide",), ["<image>\nhow many are there?", "three", "and then?", "two blue squares"]),
    (("tall",), ["look <image> here", "a tall green bar"]),
    (("square", "square"), ["<image>\n<image>\nare they the same?", "no, they differ"]),
    ((), ["hello, who are you?", "a small model"]),
]
"""(images, turns in order) of every row."""
CAPTIONS = [("wide", "a wide picture of shapes"), ("square", "a square one")]


def write_rows(folder: Path) -> Path:
    """``chat.json`` and ``captions.json`` in LLaVA-1.5's format with their images."""
    from pipelines.demo.render import render
    from pipelines.demo.scenes import sample_scene

    rng = random.Random(3)
    (folder / "images").mkdir(parents=True)

    def image(kind: str, name: str) -> str:
        render(sample_scene(rng, "train")).resize(SIZES[kind]).save(folder / "images" / name)
        return name

    rows: list[dict[str, Any]] = []
    for number, (kinds, turns) in enumerate(CHAT):
        names = [image(kind, f"{number}-{i}.png") for i, kind in enumerate(kinds)]
        said = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]
        images = {"image": names if len(names) > 1 else names[0]} if names else {}
        rows.append({"id": str(number), **images, "conversations": said})
    captions = [
        {
            "id": f"c{number}",
            "image": image(kind, f"c{number}.png"),
            "conversations": [{"from": "human", "value": "<image>\nDescribe."}, {"from": "gpt", "value": text}],
        }
        for number, (kind, text) in enumerate(CAPTIONS)
    ]
    (folder / "chat.json").write_text(json.dumps(rows))
    (folder / "captions.json").write_text(json.dumps(captions))
    return folder


def read_rows(folder: Path) -> list[Any]:
    """The chat rows as samples."""
    from teacher_cache.sources import open_source

    source = open_source(mixture(folder)[1])
    return [one for group in source.scan(100) for one in source.read(group)]


def mixture(folder: Path) -> tuple[Any, ...]:
    from teacher_cache.sources import DataSpec

    images = str(folder / "images")
    return (
        DataSpec("caption", str(folder / "captions.json"), image_root=images, template="plain"),
        DataSpec("sft", str(folder / "chat.json"), image_root=images, template="chat"),
    )
