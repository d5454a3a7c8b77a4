"""Words lie over the part of the image that they speak of."""

from __future__ import annotations

import base64
import io

import PIL.Image
import pytest

from pipelines.report.picture import CELL, LONGEST_SIDE, background_words, data_uri, draw_pictures, visible
from teacher_cache.errors import SkipSample
from teacher_cache.records import Image, ImageLayout, View


def image(size=(40, 20)) -> Image:
    """Left half red, right half blue."""
    pixels = PIL.Image.new("RGB", size, "red")
    pixels.paste("blue", (size[0] // 2, 0, *size))
    buffer = io.BytesIO()
    pixels.save(buffer, "png")
    return Image("a.png", buffer.getvalue())


def opened(uri: str) -> PIL.Image.Image:
    return PIL.Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")


def says(*words: str):
    return [[(word, 0.9), ("other", 0.1)] for word in words]


def test_each_word_lies_over_its_patch():
    layout = ImageLayout((40, 20), (View((0, 0, 40, 20), (2, 3)),))
    (picture,) = draw_pictures([image()], [layout], says("a", "b", "c", "d", "e", "f"), set())
    places = {cell.word: (cell.x / CELL - 0.5, cell.top / picture.cell_height) for cell in picture.cells}
    assert places == {"a": (0, 0), "b": (1, 0), "c": (2, 0), "d": (0, 1), "e": (1, 1), "f": (2, 1)}
    assert (picture.width, picture.height) == (3 * CELL, 3 * CELL / 2)  # the image keeps its shape: 40 × 20


def test_only_what_the_view_shows_is_drawn():
    layout = ImageLayout((40, 20), (View((20, 0, 40, 20), (1, 1)),))
    (picture,) = draw_pictures([image()], [layout], says("a"), set())
    assert opened(picture.source).getextrema() == ((0, 0), (0, 0), (255, 255))


def test_newline_tokens_and_further_views_shift_nothing():
    views = (View((0, 0, 40, 20), (2, 2), newline=True), View((0, 0, 20, 20), (1, 2)))
    layouts = [ImageLayout((40, 20), views), ImageLayout((40, 20), (View((0, 0, 40, 20), (1, 1)),))]
    told = says("a", "b", "NL", "c", "d", "NL", "tile", "tile", "second")
    first, second = draw_pictures([image(), image()], layouts, told, set())
    assert [cell.word for cell in first.cells] == ["a", "b", "c", "d"]
    assert [cell.word for cell in second.cells] == ["second"]
    assert "2 views" in first.caption


def test_a_model_of_unknown_grid_gets_its_words_in_order():
    layout = ImageLayout((40, 20), (View((0, 0, 40, 20), (1, 7)),))
    (picture,) = draw_pictures([image()], [layout], says(*"abcdefg"), set())
    assert not picture.cells and [cell.word for cell in picture.flow] == list("abcdefg")


def test_without_stored_words_the_image_is_still_there():
    layout = ImageLayout((40, 20), (View((0, 0, 40, 20), (2, 2)),))
    (picture,) = draw_pictures([image()], [layout], [], set())
    assert picture.source and not picture.cells and "none stored" in picture.description


def test_probability_decides_the_level_and_background_is_dim():
    told = [[("sky", 0.99)], [("cat", 0.02)], [("cat", 1.0)], [(",", 0.5)]]
    flat = View((0, 0, 40, 20), (2, 2))
    (picture,) = draw_pictures([image()], [ImageLayout((40, 20), (flat,))], told, {"sky"})
    assert [(cell.level, cell.dim) for cell in picture.cells] == [(5, True), (0, False), (5, False), (3, True)]


def test_background_is_shared_by_images_and_a_subject_is_not():
    shared = [
        says("wall", "wall", "wall", "dog"),
        says("wall", "wall", "cat", "cat"),
        says("wall", "sun", "sun", "sun"),
    ]
    assert background_words(shared) == ["wall"]
    assert background_words([says("dog", "dog", "dog")]) == []
    assert background_words([]) == []


def test_images_are_encoded_anew_and_small():
    assert max(opened(data_uri(PIL.Image.new("RGB", (3000, 1500), "red"))).size) == LONGEST_SIDE


def test_damaged_bytes_are_a_skip():
    layout = ImageLayout((40, 20), (View((0, 0, 40, 20), (1, 1)),))
    with pytest.raises(SkipSample, match="image_corrupt"):
        draw_pictures([Image("x.png", b"no image")], [layout], says("a"), set())


@pytest.mark.parametrize(
    ("token", "text"), [(" dog", "dog"), ("\n", "⏎"), ("  ", "␣␣"), ("", "∅"), ("<|end|>", "<|end|>")]
)
def test_white_space_is_made_visible(token, text):
    assert visible(token) == text
