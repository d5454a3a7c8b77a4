"""The ``samples`` column: a row's turns, token ids, vision layout and original image bytes, as the members of one tar sample.

Members: ``json`` (turns, layout, hash per response span, what a cut left out), ``tokens.safetensors`` (ids, roles, turns, label flags),
and the images untouched as ``0.jpg``, ``1.png``, … under the extension that their bytes call for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from teacher_cache.codecs import container
from teacher_cache.errors import CacheError
from teacher_cache.records import ROLES, Image, ImageLayout, Prepared, Sample, TextTokens, Turn, View
from teacher_cache.shards.schema import COUNT, require
from teacher_cache.sources.usable_samples import image_extension

TEXT = frozenset({"json", f"tokens.{container.EXTENSION}"})
"""Members that tell a row without its images' bytes."""
MOST_VISION_TOKENS = 1 << 20
"""Of one row: what a layout may ask a reader to count through."""
_VIEW = {"crop": [int], "grid": [COUNT], "newline": bool, "tail?": COUNT}
_CUT = {"turns": COUNT, "images": COUNT}
_SHAPE = {
    **dict.fromkeys(("part", "source_id", "place"), str),
    "ordinal": COUNT,
    "turns": [[str]],
    "images": [str],
    "extra": dict,
    "layout": [{"size": [COUNT], "views": [_VIEW]}],
    "image_at": [COUNT],
    "cut?": _CUT,
}


def encode_sample(sample: Sample, prepared: Prepared) -> dict[str, bytes]:
    """Tar members by extension, in writing order. Turns and images that a cut left out are not stored: a student reads what is here, and
    ``cut`` says how many they were."""
    turns = sample.turns[: prepared.turns]
    images = sample.images[: len(prepared.layout)]
    body = {
        "part": sample.part,
        "ordinal": sample.ordinal,
        "source_id": sample.source_id,
        "place": sample.place,
        "turns": [[turn.role, turn.text] for turn in turns],
        "images": [image.name for image in images],
        "extra": dict(sample.extra),
        "layout": [_written(one) for one in prepared.layout],
        "image_at": list(prepared.text.image_at),
        "response_sha256": [hash_ids(ids) for ids in response_spans(prepared.text)],
    }
    turns_out, images_out = left_out(sample, prepared)
    if turns_out:
        body["cut"] = {"turns": turns_out, "images": images_out}
    text = prepared.text
    tokens = {"ids": text.ids, "role": text.role, "turn": text.turn, "response": text.response}
    members = {
        "json": json.dumps(body, ensure_ascii=False, sort_keys=True, default=str).encode(),
        f"tokens.{container.EXTENSION}": container.pack(tokens),
    }
    for number, image in enumerate(images):
        members[f"{number}.{image_extension(image.data)}"] = image.data
    return members


def left_out(sample: Sample, prepared: Prepared) -> tuple[int, int]:
    """(turns, images) of the row that ``over_length = "cut"`` left out of what was prepared."""
    turns = len(sample.turns) - (len(sample.turns) if prepared.turns is None else prepared.turns)
    return turns, len(sample.images) - len(prepared.layout) if turns else 0


def cut_counts(members: Mapping[str, bytes], place: str) -> dict[str, int]:
    """What a sample's members add to its shard's counts: ``cut_rows`` and ``cut_images``; empty for a row that is whole."""
    if b'"cut"' not in members.get("json", b""):  # most rows are whole, and need no parsing
        return {}
    try:
        cut = require(json.loads(members["json"]), {"cut?": _CUT}, f"{place}: not a sample record").get("cut")
    except (ValueError, RecursionError) as error:
        raise CacheError(f"{place}: not a sample record ({type(error).__name__}: {error})") from None
    return {"cut_rows": 1, "cut_images": cut["images"]} if cut else {}


def decode_sample(
    members: Mapping[str, bytes], place: str, pictures: bool = True
) -> tuple[Sample, TextTokens, tuple[ImageLayout, ...]]:
    """The row as the mixture held it, its tokens as the teacher read them, and its layout; CacheError naming ``place``.

    pictures: False where ``TEXT`` alone was read: images then have names and no bytes.
    """
    try:
        body: dict[str, Any] = json.loads(members["json"])
        require(body, _SHAPE, f"{place}: not a sample record")
        stored = container.unpack(members[f"tokens.{container.EXTENSION}"], place)
        stored_images = {int(ext.split(".")[0]): data for ext, data in members.items() if ext[:1].isdecimal()}
        images = tuple(
            Image(name, stored_images[number] if pictures else b"") for number, name in enumerate(body["images"])
        )
        turns = tuple(Turn(role, text) for role, text in body["turns"])
        sample = Sample(body["part"], body["ordinal"], body["source_id"], body["place"], turns, images, body["extra"])
        text = TextTokens(stored["ids"], stored["role"], stored["turn"], stored["response"], tuple(body["image_at"]))
        layout = tuple(_layout(one) for one in body["layout"])
        _check(text, layout)
    except CacheError:
        raise
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise CacheError(f"{place}: not a sample record ({type(error).__name__}: {error})") from None
    return sample, text, layout


def _check(text: TextTokens, layout: tuple[ImageLayout, ...]) -> None:
    """ValueError where the parts do not fit together: what reads a sample counts on it."""
    kinds = (torch.uint32, torch.uint8, torch.uint16, torch.bool)
    columns = (text.ids, text.role, text.turn, text.response)
    if any(one.dtype != kind or one.shape != (len(text.ids),) for one, kind in zip(columns, kinds)):
        raise ValueError("its token columns differ in length, or have another type")
    if len(text.ids) and int(text.role.max()) >= len(ROLES):
        raise ValueError(f"a role {int(text.role.max())}")
    if list(text.image_at) != sorted(text.image_at) or any(at > len(text.ids) for at in text.image_at):
        raise ValueError("an image is outside the text")
    if sum(one.tokens() for one in layout) > MOST_VISION_TOKENS:
        raise ValueError(f"a layout of more than {MOST_VISION_TOKENS:,} vision tokens")


def _written(layout: ImageLayout) -> dict[str, Any]:
    """A tail is written where there is one: few families have any."""
    body = asdict(layout)
    body["views"] = [{k: v for k, v in view.items() if k != "tail" or v} for view in body["views"]]
    return body


def _layout(body: dict[str, Any]) -> ImageLayout:
    views = []
    for view in body["views"]:
        left, top, right, bottom = view["crop"]
        rows, columns = view["grid"]
        views.append(View((left, top, right, bottom), (rows, columns), view["newline"], view.get("tail", 0)))
    width, height = body["size"]
    return ImageLayout((width, height), tuple(views))


def response_spans(text: TextTokens) -> list[torch.Tensor]:
    """Response token ids, one tensor a turn."""
    turns = text.turn.to(torch.int64)
    return [text.ids[text.response & (turns == turn)] for turn in turns[text.response].unique()]


def hash_ids(ids: torch.Tensor) -> str:
    return hashlib.sha256(ids.to(torch.int64).numpy().tobytes()).hexdigest()[:16]
