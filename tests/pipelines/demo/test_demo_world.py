"""The demo world: deterministic by seed, disjoint splits, questions with one right answer."""

import random

import numpy as np
import pytest

from benchmarks.demo_training.patch_labels import ATTRIBUTES, PATCH_WORDS, patch_attributes, patch_words
from pipelines.demo.questions import IMAGE_FAMILIES, caption, image_turns
from pipelines.demo.render import pixels_u8
from pipelines.demo.scenes import CELLS, COLORS, IMAGE_SIZE, sample_scene, split_of
from pipelines.demo.world import FAMILIES, caption_rows, heldout_rows, train_rows

KINDS = ("shapes", "chart", "reading")


def scenes(kind, count=60, split="train", seed=5):
    rng = random.Random(seed)
    return [sample_scene(rng, split, kind) for _ in range(count)]


def test_equal_seeds_give_equal_rows_and_pixels():
    first, second = list(train_rows(40, 3)), list(train_rows(40, 3))
    assert first == second
    assert list(train_rows(40, 4)) != first
    assert all(
        np.array_equal(pixels_u8(a.scenes[0]), pixels_u8(b.scenes[0])) for a, b in zip(first, second) if a.scenes
    )


def test_heldout_scenes_never_occur_in_the_other_splits():
    heldout = {scene.key for row in heldout_rows(300, 1) for scene in row.scenes}
    seen = {s.key for rows in (train_rows(1500, 1, 0.05), caption_rows(800, 1)) for row in rows for s in row.scenes}
    assert heldout and not heldout & seen
    assert all(split_of(key) == "heldout" for key in heldout)


def test_heldout_rows_ask_one_question_of_one_family_each():
    rows = list(heldout_rows(140, 2))
    assert {row.family for row in rows} == set(FAMILIES)
    assert all(len(row.turns) == 1 and row.turns[0].family == row.family for row in rows)
    questions = [(row.scenes[0].key, row.turns[0].question) for row in rows if row.scenes]
    assert len(set(questions)) == len(questions)


def test_train_rows_are_mostly_multi_turn():
    rows = list(train_rows(300, 2, two_image_share=0.05))
    turns = [len(row.turns) for row in rows if len(row.scenes) == 1]
    assert min(turns) >= 3 and max(turns) <= 6
    assert any(len(row.scenes) == 2 for row in rows) and any(not row.scenes for row in rows)
    pair = next(row for row in rows if len(row.scenes) == 2)
    assert pair.conversations[0]["value"].startswith("<image>\n<image>\n")


@pytest.mark.parametrize("kind", KINDS)
def test_no_question_has_two_answers(kind):
    for scene in scenes(kind):
        answers = {}
        for turn in image_turns(scene, random.Random(0), 100):
            assert answers.setdefault(turn.question, turn.answer) == turn.answer
            assert turn.family in IMAGE_FAMILIES


def test_answers_agree_with_the_picture():
    """An independent reading of the scene for the questions that are easy to get wrong."""
    for scene in scenes("shapes", 200):
        for turn in image_turns(scene, random.Random(0), 100):
            if turn.question.startswith("Where is the "):
                named = turn.question.removeprefix("Where is the ").rstrip("?").split()
                matching = [s for s in scene.shapes if all(word in (s.color, s.shape, "shape") for word in named)]
                assert [CELLS[s.cell] for s in matching] == [turn.answer]
            if turn.family == "shapes_count" and turn.question != "How many shapes are there?":
                word = turn.question.split()[2]
                expected = sum(word == s.color or word.startswith(s.shape) for s in scene.shapes)
                assert turn.answer == str(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_everything_drawn_differs_from_the_background_where_the_labels_say_so(kind):
    for scene in scenes(kind, 30):
        pixels = pixels_u8(scene).astype(int)
        assert pixels.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
        words = patch_words(scene).reshape(12, 12, -1)
        differs = (np.abs(pixels - np.median(pixels[:2].reshape(-1, 3), 0)).sum(-1) > 60).reshape(12, 8, 12, 8)
        drawn = differs.mean((1, 3))
        labelled = words[..., 0] != PATCH_WORDS.index("background")
        assert drawn[labelled].mean() > 0.1
        assert drawn[~labelled].mean() < 0.05
        attributes = patch_attributes(scene)
        assert (attributes < np.array(list(ATTRIBUTES.values()))).all()


def test_captions_name_everything():
    for scene in scenes("shapes", 40):
        text = caption(scene)
        assert all(f"{s.color} {s.shape}" in text and CELLS[s.cell] in text for s in scene.shapes)
    for scene in scenes("chart", 40):
        assert all(f"{b.color} bar of {b.value}" in caption(scene) for b in scene.bars)
    assert all(s.text in caption(s) and s.ink in COLORS for s in scenes("reading", 40))
