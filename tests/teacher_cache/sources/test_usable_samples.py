"""Turn order, placeholders, images that decode or say why not, and row keys."""

from __future__ import annotations

import hashlib
import io
import re
import struct
import zlib
from dataclasses import replace

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.errors import SkipSample
from teacher_cache.records import Image, Sample, Turn
from teacher_cache.sources.usable_samples import (
    check_sample,
    check_turns,
    decode_image,
    image_extension,
    row_key,
    stand_up,
)

LIMIT = 1_000_000

# pytest resets the filters that rows.py sets.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")


def encode(picture: PIL.Image.Image, kind: str = "png", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(size=(40, 30), mode="RGB") -> PIL.Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return PIL.Image.fromarray(values).convert(mode)


def sample(*turns: tuple[str, str], images: tuple[bytes, ...] = ()) -> Sample:
    named = tuple(Image(f"{i}.png", data) for i, data in enumerate(images))
    return Sample("sft", 3, "id", "a.json row 3", tuple(Turn(*turn) for turn in turns), named)


def reason_of(row: Sample) -> str | None:
    try:
        check_sample(row, LIMIT)
    except SkipSample as skip:
        return skip.reason
    return None


S, U, A = ("system", "s"), ("user", "u"), ("assistant", "a")


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([U, A], None),
        ([S, U, A], None),
        ([U, A, U, A], None),
        ([U, A, U], None),
        ([], "no_answer"),
        ([U], "no_answer"),
        ([S], "no_answer"),
        ([U, U], "no_answer"),
        ([A], "bad_turn_order"),
        ([A, U], "bad_turn_order"),
        ([S, A], "bad_turn_order"),
        ([S, S, U, A], "bad_turn_order"),
        ([U, S, A], "bad_turn_order"),
        ([U, A, A], "bad_turn_order"),
        ([U, U, A], "bad_turn_order"),
        ([U, ("assistant", "")], "empty_answer"),
        ([U, ("assistant", " \n\t\u3000")], "empty_answer"),
        ([U, A, ("user", ""), ("assistant", "")], "empty_answer"),
        ([("user", ""), A], None),
        ([("user", "<image>"), A], "placeholder_mismatch"),
        ([U, ("assistant", "see <image>")], "placeholder_mismatch"),
        ([("user", "<Image> <image > image"), A], None),
    ],
)
def test_turns_without_images(turns, reason):
    assert reason_of(sample(*turns)) == reason


@pytest.mark.parametrize(
    ("turns", "count", "reason"),
    [
        ([("user", "<image>"), A], 1, None),
        ([("user", "<image><image>"), A], 2, None),
        ([("user", "<image>"), A, ("user", "<image>"), A], 2, None),
        ([U, A], 1, "placeholder_mismatch"),
        ([("user", "<image>"), A], 2, "placeholder_mismatch"),
        ([("user", "<image><image>"), A], 1, "placeholder_mismatch"),
    ],
)
def test_placeholders_are_counted_over_all_turns(turns, count, reason):
    assert reason_of(sample(*turns, images=(encode(noise()),) * count)) == reason


def test_a_mismatch_says_in_which_turns_the_placeholders_stand():
    turns = [("user", "<image><image>"), A, U, ("assistant", "the tag <image>")]
    with pytest.raises(SkipSample, match=r"3 <image> in the text \(turn 0, 0, 3\), 1 images"):
        check_turns(sample(*turns, images=(encode(noise()),)))
    with pytest.raises(SkipSample, match=r"0 <image> in the text, 1 images"):
        check_turns(sample(U, A, images=(encode(noise()),)))


def test_one_bad_image_among_good_ones_is_found():
    good = encode(noise())
    row = sample(("user", "<image><image>"), A, images=(good, good[:-200]))
    check_turns(row)
    assert reason_of(row) == "image_corrupt"


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "I;16"])
def test_every_mode_of_every_kind_becomes_rgb(mode):
    picture = PIL.Image.new("I;16", (40, 30), 1000) if mode == "I;16" else noise(mode=mode)
    written = 0
    for kind in ("png", "jpeg", "webp", "gif", "bmp", "tiff"):
        try:
            data = encode(picture, kind)
        except (OSError, ValueError):
            continue  # Pillow does not write this mode in this format
        decoded = decode_image(Image("x", data), LIMIT)
        assert (decoded.mode, decoded.size) == ("RGB", (40, 30)), kind
        written += 1
    assert written >= 2


def test_pixels_of_a_plain_image_are_untouched():
    assert np.array_equal(decode_image(Image("x", encode(noise())), LIMIT), noise())


def test_transparency_lies_over_white():
    black_text = PIL.Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    black_text.putpixel((0, 0), (0, 0, 0, 255))
    expected = [[[0, 0, 0], [255, 255, 255]]]
    palette = PIL.Image.new("P", (2, 1), 0)
    palette.putpalette([0, 0, 0, 10, 10, 10])
    palette.putpixel((0, 0), 1)
    encoded = {
        "RGBA": encode(black_text),
        "LA": encode(black_text.convert("LA")),
        "P, one colour": encode(palette, transparency=0),
        "P, bytes": encode(palette, transparency=bytes([0, 255])),
        "RGB, one colour": encode(palette.convert("RGB"), transparency=(0, 0, 0)),
        "gif": encode(palette, "gif", transparency=0),
    }
    for name, data in encoded.items():
        got = np.asarray(decode_image(Image(name, data), LIMIT)).tolist()
        assert got[0][1] == [255, 255, 255], name
        assert max(got[0][0]) <= 10, name
    assert np.asarray(decode_image(Image("x", encoded["RGBA"]), LIMIT)).tolist() == expected


def test_sixteen_bits_are_scaled_not_clipped():
    values = np.array([[0, 257 * 100, 65535]], dtype=np.uint16)
    decoded = decode_image(Image("x", encode(PIL.Image.fromarray(values))), LIMIT)
    assert np.asarray(decoded)[0, :, 0].tolist() == [0, 100, 255]


def test_floating_point_pixels_are_refused():
    data = encode(PIL.Image.new("F", (3, 3), 0.5), "tiff")
    with pytest.raises(SkipSample, match=r"image_corrupt.*floating-point"):
        decode_image(Image("x", data), LIMIT)


@pytest.mark.parametrize("orientation", [*range(0, 10), "six"])
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff"])
def test_exif_orientation_is_applied_as_by_transformers(orientation, kind):
    from transformers.image_utils import load_image

    exif = PIL.Image.Exif()
    if orientation != "six":
        exif[0x0112] = orientation
    data = encode(noise(), kind, exif=exif)
    upright, stored = (decode_image(Image("x", data), LIMIT, upright) for upright in (True, False))
    theirs = load_image(PIL.Image.open(io.BytesIO(data)))
    assert np.array_equal(np.asarray(upright), np.asarray(theirs))
    turned = orientation in (5, 6, 7, 8)
    assert upright.size == ((30, 40) if turned else (40, 30))
    if kind != "tiff":  # whose decoder stands pictures up itself
        assert stored.size == (40, 30)
        assert (np.asarray(stored) == np.asarray(PIL.Image.open(io.BytesIO(data)).convert("RGB"))).all()


def test_an_upright_picture_stands_up_once():
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    opened = PIL.Image.open(io.BytesIO(encode(noise(), "jpeg", exif=exif)))
    assert stand_up(opened).size == (30, 40)
    assert stand_up(PIL.ImageOps.exif_transpose(opened)).size == (30, 40)


def test_damaged_exif_data_say_nothing():
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    data = bytearray(encode(noise(), "jpeg", exif=exif))
    at = data.index(b"Exif\0\0") + 6
    for damage in (b"\xff" * 8, b"MM\x00\x2a\xff\xff\xff\xff"):
        data[at : at + 8] = damage
        assert decode_image(Image("x.jpg", bytes(data)), LIMIT).size == (40, 30)


def test_an_animation_counts_as_its_first_frame_and_a_wrong_extension_is_fine():
    frames = [PIL.Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encode(frames[0], "gif", save_all=True, append_images=frames[1:])
    decoded = decode_image(Image("renamed.jpg", data), LIMIT)
    assert decoded.getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif", "bmp", "tiff"])
@pytest.mark.parametrize("keep", [0.02, 0.3, 0.7, 0.95])
def test_truncated_files_are_corrupt(kind, keep):
    data = encode(noise((200, 150)), kind)
    with pytest.raises(SkipSample) as caught:
        decode_image(Image("x", data[: int(len(data) * keep)]), LIMIT)
    assert caught.value.reason == "image_corrupt"
    assert "\n" not in caught.value.detail


@pytest.mark.parametrize(
    "data",
    [b"x", b"<html>404 Not Found</html>", b"\xff\xd8\xff", b"GIF89a", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\0" * 5000],
)
def test_what_is_no_image_is_corrupt(data):
    with pytest.raises(SkipSample) as caught:
        decode_image(Image("x.jpg", data), LIMIT)
    assert caught.value.reason == "image_corrupt"


def test_no_bytes_are_a_missing_image():
    with pytest.raises(SkipSample, match="image_missing"):
        decode_image(Image("x.jpg", b""), LIMIT)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    "size", [(1001, 1000), (9000, 9000), (12_000, 12_000), (60_000, 60_000), (2**31 - 1, 2**31 - 1)]
)
def test_a_decompression_bomb_is_refused_by_its_header(size):
    with pytest.raises(SkipSample) as caught:
        decode_image(Image("bomb.png", png_header(*size)), LIMIT)
    assert caught.value.reason == "image_too_large"


def test_the_limit_itself_is_allowed():
    assert decode_image(Image("x", encode(noise((40, 30)))), 1200).size == (40, 30)
    with pytest.raises(SkipSample, match="1,200 pixels, more than 1,199"):
        decode_image(Image("x", encode(noise((40, 30)))), 1199)


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["png", "jpeg", "webp", "gif", "bmp", "tiff"]),
    at=st.floats(0, 1, exclude_max=True),
    junk=st.binary(max_size=6),
)
def test_damaged_bytes_decode_or_skip_but_never_crash(kind, at, junk):
    data = bytearray(encode(noise((12, 9)), kind))
    start = int(at * len(data))
    data[start : start + len(junk)] = junk
    try:
        assert decode_image(Image("x", bytes(data)), LIMIT).mode == "RGB"
    except SkipSample as skip:
        assert skip.reason in ("image_corrupt", "image_too_large")


@pytest.mark.parametrize(
    ("kind", "extension"),
    [("png", "png"), ("jpeg", "jpg"), ("webp", "webp"), ("gif", "gif"), ("bmp", "bmp"), ("tiff", "bin")],
)
def test_extensions_come_from_the_content(kind, extension):
    assert image_extension(encode(noise(), kind)) == extension


@pytest.mark.parametrize("data", [b"", b"RIFF", b"RIFF1234WAVE", b"\xff\xd8", b"hello"])
def test_unknown_content_is_bin(data):
    assert image_extension(data) == "bin"


def test_row_keys_are_stable():
    """A cache on disk holds these keys: they may never change."""
    row = sample(("user", "<image>\nwhät?"), ("assistant", "a cat"), images=(b"bytes",))
    written = b"2 1 4 user 14 <image>\nwh\xc3\xa4t? 9 assistant 5 a cat 5 bytes"
    assert row_key(row) == f"000000003-{hashlib.sha256(written).hexdigest()[:8]}" == "000000003-86b46cb7"
    assert re.fullmatch(r"[0-9a-f-]+", row_key(replace(row, ordinal=12_345_678_901)))


def test_row_keys_cover_turns_and_images_and_nothing_else():
    row = sample(U, A, images=(b"ab", b"c"))
    others = [
        sample(("user", "v"), A, images=(b"ab", b"c")),
        sample(("system", "u"), A, images=(b"ab", b"c")),
        sample(U, A, images=(b"a", b"bc")),
        sample(U, A, images=(b"c", b"ab")),
        sample(U, A, images=(b"abc",)),
        sample(("user", "u assistant 1 a"), images=(b"ab", b"c")),
        replace(row, ordinal=4),
    ]
    assert len({row_key(r) for r in [row, *others]}) == len(others) + 1
    same = replace(row, source_id="other", place="b.json row 9", part="p", extra={"x": 1})
    renamed = replace(row, images=tuple(replace(image, name="other") for image in row.images))
    assert row_key(same) == row_key(renamed) == row_key(row)
