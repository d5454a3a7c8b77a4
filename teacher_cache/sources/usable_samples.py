"""What makes a row usable, whatever its format: turn order, placeholders, images that decode; and its key.

Decisions about images, the same for teacher and student:

- An animated image (GIF, WebP, APNG) counts as its first frame, as in LLaVA's and transformers' loaders.
- A file whose content and extension differ (GIF renamed ``.jpg``) is used if it decodes; ``doctor`` mentions it.
- EXIF orientation is applied, as in transformers' own loader: the picture stands as a viewer shows it. Damaged EXIF data say nothing.
- Transparency is laid over white. Dropping the alpha channel would show whatever colour lies under it, mostly black,
  and black text on a transparent ground would vanish.
- 16-bit grey is scaled to 8 bits; floating-point pixels have no agreed range and are refused.
"""

from __future__ import annotations

import hashlib
import io
import warnings

import numpy as np
import PIL.Image

from teacher_cache.errors import SkipSample
from teacher_cache.records import Image, Sample, Turn

PLACEHOLDER = "<image>"

# Only these are tried: some of Pillow's other openers start programs (EPS) or were never meant for untrusted bytes.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")

TILE_WIDTH, TILE_LENGTH = 322, 323
ORIENTATION = 0x0112
TURNS = dict(
    zip(
        range(2, 9),
        (
            PIL.Image.Transpose.FLIP_LEFT_RIGHT,
            PIL.Image.Transpose.ROTATE_180,
            PIL.Image.Transpose.FLIP_TOP_BOTTOM,
            PIL.Image.Transpose.TRANSPOSE,
            PIL.Image.Transpose.ROTATE_270,
            PIL.Image.Transpose.TRANSVERSE,
            PIL.Image.Transpose.ROTATE_90,
        ),
    )
)
"""By EXIF orientation (1: as stored)."""
SMALL_TILE = 1 << 22
"""Pixels of a TIFF's tile that may be more than those of its image."""

# ``decode_image`` has its own limit, and what matters of a damaged file becomes a skip record: Pillow's warnings (size,
# "Corrupt EXIF data", a line for nearly every such file) would only drown a terminal.
warnings.filterwarnings("ignore", category=PIL.Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

_MAGIC = (
    (b"\xff\xd8\xff", "jpg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF87a", "gif"),
    (b"GIF89a", "gif"),
    (b"BM", "bmp"),
)


def check_sample(sample: Sample, max_image_pixels: int) -> None:
    """The whole check of one row: its turns, then every image decoded.

    Raises:
        SkipSample: bad_turn_order, no_answer, empty_answer, placeholder_mismatch, image_missing, image_corrupt,
            image_too_large; the first that is found, the cheap ones first.
    """
    check_turns(sample)
    for image in sample.images:
        decode_image(image, max_image_pixels)


def check_turns(sample: Sample) -> None:
    """The checks that need no image: at most one leading system turn, then user and assistant in alternation.

    A last user turn without an answer is legal: it carries no label and does no harm.

    Raises:
        SkipSample: no_answer, bad_turn_order, empty_answer, placeholder_mismatch.
    """
    turns = sample.turns
    if not any(turn.role == "assistant" for turn in turns):
        raise SkipSample("no_answer", f"{len(turns)} turns, none by the assistant")
    _check_order(turns)
    for number, turn in enumerate(turns):
        if turn.role == "assistant" and not turn.text.strip():
            raise SkipSample("empty_answer", f"turn {number} is {turn.text[:20]!r}")
    places = [number for number, turn in enumerate(turns) for _ in range(turn.text.count(PLACEHOLDER))]
    if len(places) != len(sample.images):
        where = f" (turn {', '.join(map(str, places[:9]))})" if places else ""
        what = f"{len(places)} {PLACEHOLDER} in the text{where}, {len(sample.images)} images"
        raise SkipSample("placeholder_mismatch", what)


def _check_order(turns: tuple[Turn, ...]) -> None:
    first = 1 if turns[0].role == "system" else 0
    for number, turn in enumerate(turns[first:]):
        expected = ("user", "assistant")[number % 2]
        if turn.role != expected:
            raise SkipSample("bad_turn_order", f"turn {first + number} is by {turn.role}, expected {expected}")


def decode_image(image: Image, max_pixels: int, upright: bool = True) -> PIL.Image.Image:
    """The image as RGB, 8 bits a channel, fully loaded. See the head of this file for animation, alpha and 16 bits.

    upright: EXIF orientation is applied; False: pixels are taken as stored, as preparation version 1 did.

    The size is checked on the header before any pixel is decoded. Pillow itself refuses more than 178,956,970 pixels
    whatever ``max_pixels`` says.

    Raises:
        SkipSample: image_missing (no bytes), image_too_large, image_corrupt.
    """
    if not image.data:
        raise SkipSample("image_missing", f"{image.name!r} has no bytes")
    try:
        _check_pixels(image.name, _webp_canvas(image.data), max_pixels)
        with PIL.Image.open(io.BytesIO(image.data), formats=FORMATS) as opened:
            _check_pixels(image.name, opened.size, max_pixels)
            _check_pixels(image.name, _tile(opened), max(max_pixels, SMALL_TILE))
            opened.load()
            return to_rgb(stand_up(opened) if upright else opened)
    except (SkipSample, MemoryError):
        raise  # running out of memory says nothing about the row
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as error:
        raise SkipSample("image_too_large", f"{image.name!r}: {error}") from error
    except PIL.UnidentifiedImageError as error:
        start = image.data[:8]
        raise SkipSample(
            "image_corrupt", f"{image.name!r} is not an image of a known format, begins with {start!r}"
        ) from error
    except Exception as error:  # damaged bytes make Pillow's decoders raise nearly anything (struct, index, value, …)
        raise SkipSample("image_corrupt", f"{image.name!r}: {type(error).__name__}: {str(error)[:120]}") from error


def stand_up(image: PIL.Image.Image) -> PIL.Image.Image:
    """The image as its EXIF orientation wants it shown; itself where it has none."""
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged EXIF data raise nearly anything, and the pixels are whole
        return image
    turn = TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)


def _check_pixels(name: str, size: tuple[int, int], most: int) -> None:
    width, height = size
    if width * height > most:
        pixels = f"{width}x{height} = {width * height:,} pixels"
        raise SkipSample("image_too_large", f"{name!r} has {pixels}, more than {most:,}")


def _webp_canvas(data: bytes) -> tuple[int, int]:
    """Of an extended WebP, (0, 0) of all others: the library asks for the memory of its canvas as soon as it is opened."""
    if data[:4] != b"RIFF" or data[8:16] != b"WEBPVP8X" or len(data) < 30:
        return 0, 0
    return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")


def _tile(opened: PIL.Image.Image) -> tuple[int, int]:
    """Of a tiled TIFF, (0, 0) of all others: the decoder makes room for a whole tile, however small the image is."""
    tags = getattr(opened, "tag_v2", {})
    return int(tags.get(TILE_WIDTH, 0)), int(tags.get(TILE_LENGTH, 0))


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Any mode → RGB, alpha laid over white.

    Raises:
        ValueError: floating-point pixels, or a mode without a way to RGB.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range; convert the file to 8 bits")
    if image.mode.startswith("I"):
        return _grey16_to_rgb(image)
    if image.has_transparency_data:
        # Premultiplied modes (La, RGBa) only convert to their plain twin.
        plain = image.convert({"La": "LA", "RGBa": "RGBA"}.get(image.mode, image.mode)).convert("RGBA")
        ground = PIL.Image.new("RGBA", plain.size, (255, 255, 255, 255))
        return PIL.Image.alpha_composite(ground, plain).convert("RGB")
    return image.convert("RGB")


def _grey16_to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Modes I and I;16 hold 0 … 65535; Pillow's own conversion would clip all above 255 to white."""
    values = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
    return PIL.Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")


def image_extension(data: bytes) -> str:
    """``jpg``, ``png``, ``webp``, ``gif`` or ``bmp`` by the first bytes; ``bin`` for anything else."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((extension for magic, extension in _MAGIC if data.startswith(magic)), "bin")


def row_key(sample: Sample) -> str:
    """``{ordinal:09d}-{hash8}``: unique inside a part by the ordinal, bound to the content by the hash.

    The hash covers the turns (role, text) and the images' bytes, each with its length so that no two rows run together.
    """
    digest = hashlib.sha256()
    parts = [
        field for turn in sample.turns for field in (turn.role.encode(), turn.text.encode("utf-8", "surrogatepass"))
    ]
    digest.update(f"{len(sample.turns)} {len(sample.images)}".encode())
    for data in (*parts, *(image.data for image in sample.images)):
        digest.update(f" {len(data)} ".encode())
        digest.update(data)
    return f"{sample.ordinal:09d}-{digest.hexdigest()[:8]}"
