"""Matched tokens as geometry: right places, equal colours, lines only where a match is elsewhere."""

from __future__ import annotations

import io

import PIL.Image
import pytest

from pipelines.report.matching_picture import draw_matching, local_share, mean_distance, tokens_of
from teacher_cache.records import Image, ImageLayout, View

SIZE = (120, 80)


def layout(rows: int, columns: int, newline: bool = False) -> ImageLayout:
    return ImageLayout(SIZE, (View((0, 0, *SIZE), (rows, columns), newline),))


@pytest.fixture
def image() -> Image:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", SIZE, "teal").save(buffer, "PNG")
    return Image("a.png", buffer.getvalue())


def test_tokens_stand_where_their_patches_are():
    tokens = tokens_of(layout(2, 3, newline=True))
    assert sorted(tokens) == [0, 1, 2, 4, 5, 6], "a newline after every grid row has no place"
    assert tokens[4].centre == (20.0, 60.0) and (tokens[4].width, tokens[4].height) == (40.0, 40.0)


def test_local_matches_are_told_from_far_ones():
    ours, theirs = tokens_of(layout(2, 3)), tokens_of(layout(4, 6))
    own = [(ours[0], theirs[0]), (ours[5], theirs[23])]
    assert local_share(own) == 1.0 and mean_distance(own) == pytest.approx(2**0.5 / 4)
    far = [*own, (ours[0], theirs[23]), (ours[0], theirs[2])]
    assert local_share(far) == 0.75  # the last: three quarters of a cell aside
    assert mean_distance(far[2:3]) == pytest.approx((2.25**2 + 1.25**2) ** 0.5)


def test_equal_colours_belong_together(image):
    student, teacher = layout(2, 3), layout(4, 6)
    ours, theirs = tokens_of(student), tokens_of(teacher)
    pairs = [(ours[i], theirs[at]) for i, at in enumerate((0, 2, 23, 12, 14, 16))]
    picture = draw_matching(image, student, teacher, pairs, "key")
    assert (picture.tokens, picture.teacher_tokens, len(picture.teacher)) == (6, 24, 24)
    assert len({one.colour for one in picture.student}) == 6
    by_number = {one.number: one for one in picture.teacher if one.colour}
    assert sorted(by_number) == list("123456")
    assert all(by_number[one.number].colour == one.colour for one in picture.student)
    assert (by_number["3"].x, by_number["3"].y) == (400.0, 240.0)
    assert sum(not one.colour for one in picture.teacher) == 18
    assert picture.lines == ["M400.0 80.0L440.0 280.0"], "the only match outside its token's own cell"
    assert picture.share == 5 / 6 and 0 < picture.any_share < picture.share


def test_many_tokens_are_not_numbered(image):
    side = layout(12, 12)
    tokens = tokens_of(side)
    picture = draw_matching(image, side, side, [(one, one) for one in tokens.values()], "key")
    assert not any(one.number for one in picture.student) and picture.share == 1.0 and not picture.lines
