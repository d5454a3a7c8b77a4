"""Wrong answers of the demo world: the share that was asked for, plausible, written down, and nothing else changed."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipelines.demo.world import train_rows
from pipelines.demo.write_world import write_world
from pipelines.demo.wrong_answers import WrongAnswers


def planted(share: float, count: int = 300, seed: int = 3, two_image_share: float = 0.0):
    clean = list(train_rows(count, seed, two_image_share))
    wrong = WrongAnswers(share, seed)
    return clean, list(wrong.apply(clean)), wrong.done


@pytest.mark.parametrize("share", [0.0, 0.2, 0.4, 1.0])
def test_the_share_is_kept_and_every_replaced_answer_is_listed(share):
    clean, rows, done = planted(share, two_image_share=0.1)
    turns = sum(len(row.turns) for row in clean)
    assert abs(len(done) / turns - share) < 0.06
    listed = {(one["row"], one["turn"]): one for one in done}
    for i, (before, after) in enumerate(zip(clean, rows, strict=True)):
        assert after.scenes == before.scenes and after.id == before.id
        for j, (a, b) in enumerate(zip(before.turns, after.turns, strict=True)):
            assert replace(b, answer=a.answer) == a, "the question stays"
            assert (a.answer != b.answer) == ((i, j) in listed)
            if one := listed.get((i, j)):
                assert one == {
                    "row": i, "id": before.id, "turn": j, "family": a.family, "right": a.answer, "wrong": b.answer,
                }  # fmt: skip


def test_wrong_answers_are_of_the_same_form_and_as_frequent_as_right_ones():
    _, _, done = planted(1.0, count=1200)
    assert all(one["right"].isdigit() == one["wrong"].isdigit() for one in done)
    reading = [one for one in done if one["family"] == "reading" and one["right"].isupper()]
    assert reading and all(len(one["right"]) == len(one["wrong"]) for one in reading)
    colors = [one for one in done if one["family"] == "shapes_color"]
    right, wrong = (Counter(one[name] for one in colors) for name in ("right", "wrong"))
    assert max(abs(right[c] - wrong[c]) for c in right) < 0.1 * len(colors)


def test_equal_seeds_give_equal_wrong_answers_and_captions_and_heldout_are_clean(tmp_path: Path):
    sizes = {"captions": 6, "train": 12, "heldout": 14, "seed": 1}
    clean = write_world(tmp_path / "clean", **sizes)
    first, second = (write_world(tmp_path / name, **sizes, wrong_answers=0.5) for name in ("a", "b"))
    assert first.wrong == second.wrong and first.wrong and not clean.wrong
    assert (tmp_path / "a/wrong_answers.json").read_bytes() == (tmp_path / "b/wrong_answers.json").read_bytes()
    for name in ("captions.json", "heldout.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "clean" / name).read_bytes()
    rows = [
        row for file in sorted(Path(first.train).parent.glob("*.parquet")) for row in pq.read_table(file).to_pylist()
    ]
    for one in first.wrong:
        assert rows[one["row"]]["conversations"][2 * one["turn"] + 1]["value"] == one["wrong"]


@pytest.mark.parametrize("share", [-0.1, 1.5, 40])
def test_a_share_outside_0_to_1_is_refused(share):
    with pytest.raises(ValueError, match=f"wrong_answers {share}: give a share between 0 and 1"):
        WrongAnswers(share, 0)
