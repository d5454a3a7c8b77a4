"""Where a row's images are, as its columns and parts name them: a path below the image root, or bytes in the row itself."""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from teacher_cache.errors import SkipSample
from teacher_cache.sources.row_values import checked_text, is_given

IMAGE_COLUMNS = ("image", "images")

_DATA_URI = re.compile(r"data:(?:image/([\w.+-]+))?[^,]*;base64,", re.IGNORECASE)
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")
# How JPEG, PNG, GIF, WebP, BMP and TIFF begin in base64. A path has a dot, which base64 has not.
_BASE64 = re.compile(
    r"(?:/9j/|iVBORw0KGgo|R0lGOD|UklGR|Qk[0-3][A-Za-z0-9+/]{5}AAAA|SUkqA|TU0AK)[A-Za-z0-9+/\r\n]{40,}={0,2}\s*"
)


_OTHER_COLUMN = re.compile(r"(?:image|img|picture|photo)s?(?:_(?:path|file|url|bytes|base64)s?)?", re.IGNORECASE)
MEDIA = frozenset({*("mp4", "webm", "mkv", "mov", "avi", "m4v"), *("mp3", "wav", "flac", "ogg", "opus", "m4a")})
"""Extensions of videos and sounds."""


@dataclass(frozen=True)
class ImageRef:
    """Where an image is: a path below the image root, or its own bytes, as they are or as base64 text (``inline``)."""

    name: str
    inline: str | bytes | None = None

    def decode(self) -> bytes:
        """The bytes that the row itself holds; SkipSample where they are no base64 or empty."""
        assert self.inline is not None
        data = self.inline
        if isinstance(data, str):
            try:
                data = base64.b64decode("".join(data.split()), validate=True)
            except (binascii.Error, ValueError) as error:
                raise SkipSample("image_corrupt", f"{self.name!r}: its base64 text is damaged ({error})") from error
        if not data:
            raise SkipSample("image_missing", f"the row's image {self.name!r} has no bytes (empty)")
        return data


def listed_refs(row: Mapping[str, Any]) -> list[ImageRef]:
    """The images beside the text: those of ``image``, then those of ``images``; once where both columns name the same.

    Raises:
        SkipSample: bad_row, image_missing (an address in the web, or neither bytes nor path).
    """
    one, more = (_refs(row.get(name), repr(name)) for name in IMAGE_COLUMNS)
    return one if one == more else one + more


def refuse_other_columns(row: Mapping[str, Any]) -> None:
    """SkipSample where a row without images names some in a column that is not read: it would be trained on as text."""
    for name in row:
        if (
            isinstance(name, str)
            and _OTHER_COLUMN.fullmatch(name)
            and name not in IMAGE_COLUMNS
            and is_given(row[name])
        ):
            raise SkipSample(
                "image_missing", f"the row names images in {name!r}, which is not read: call it 'image' or 'images'"
            )


def _refs(value: Any, what: str) -> list[ImageRef]:
    """Of a column: nothing, one image or a list of them."""
    if value is None or value == "":
        return []
    listed = value if isinstance(value, list) else [value]
    if None in listed:
        raise SkipSample("image_missing", f"image {listed.index(None)} of {what} is null")
    return [ref_of(one, what) for one in listed]


def part_ref(part: Mapping[str, Any], what: str) -> ImageRef | None:
    """What an image part names; None: it takes the next of the row's images."""
    if part.get("bytes") is not None:
        return ref_of({"bytes": part["bytes"], "path": part.get("path")}, what)
    value = next((part[name] for name in ("image", "image_url", "path", "url") if part.get(name) is not None), None)
    if isinstance(value, Mapping) and value.get("url") is not None:
        value = value["url"]
    return None if value is None else ref_of(value, what)


def ref_of(value: Any, what: str) -> ImageRef:
    """A path, a ``data:`` URI, base64 text, bytes, or ``{bytes, path}`` of which one may be null.

    Raises:
        SkipSample: bad_row, image_missing, media_unsupported.
    """
    if isinstance(value, bytes):
        return ImageRef("", value)
    if isinstance(value, Mapping):
        return _struct_ref(value, what)
    name = checked_text(value, what)
    if name[:10].lower() in ("data:video", "data:audio"):
        raise SkipSample("media_unsupported", f"{what} is {name[:20]!r}…")
    if inline := _DATA_URI.match(name):
        return ImageRef(f"inline.{(inline[1] or 'bin').lower()}", name[inline.end() :])
    if _BASE64.fullmatch(name):
        return ImageRef("inline", name)
    if name.lower().startswith("file://"):
        return ImageRef(name[len("file://") :])
    if (scheme := _SCHEME.match(name)) and (name.startswith(f"{scheme[1]}://") or scheme[1].lower() == "data"):
        raise SkipSample(
            "image_missing",
            f"{name[:80]!r} is a web address, and kdcli fetches none: download it and write its path below the image root",
        )
    if name.rpartition(".")[2].lower() in MEDIA:
        raise SkipSample("media_unsupported", f"{what} is {name[-80:]!r}")
    return ImageRef(name)


def _struct_ref(value: Mapping[str, Any], what: str) -> ImageRef:
    path, data = value.get("path"), value.get("bytes")
    if isinstance(data, bytes):
        return ImageRef("" if path is None else checked_text(path, f"'path' of {what}"), data)
    if data is not None:
        name = "inline" if path is None else checked_text(path, f"'path' of {what}")
        return ImageRef(os.path.basename(name), checked_text(data, f"'bytes' of {what}"))
    if path is None and value.keys() & {"path", "bytes"}:
        raise SkipSample("image_missing", f"{what} has neither bytes nor path: both are null")
    return ref_of(path, what)
