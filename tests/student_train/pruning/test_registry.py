"""What a pruning says before it runs: choices, limits, counts; and what each operator chooses of numbers made for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from student_train.pruning import Pruning, operator_module, operator_modules
from student_train.pruning.seen import Seen, largest
from teacher_cache.errors import CompatibilityError, KdcliError

OPERATORS = sorted(operator_modules())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"operator": "fastvv", "keep": 4},
            "unknown compression operator 'fastvv': choose from dart, fastv, pyramiddrop, random",
        ),
        ({"operator": "dart", "layer": 0, "keep": 4}, r"layer must be at least 1 \(the layer before it ranks\), got 0"),
        ({"operator": "pyramiddrop", "layer": -1}, "layer must be at least 0, got -1"),
        ({"operator": "dart"}, "give the number of vision tokens"),
        ({"operator": "dart", "keep": 4, "removed": 0.5}, "not both"),
        ({"operator": "dart", "keep": 0}, "at least 1 vision token"),
        ({"operator": "dart", "keep": "4"}, "keep at least 1 vision token per image, got '4'"),
        ({"operator": "dart", "keep": 4, "layer": 1.5}, "layer must be at least 1"),
        ({"operator": "dart", "removed": 1.0}, "below 1, got 1"),
        ({"operator": "dart", "removed": -0.1}, "at least 0"),
        ({"operator": "dart", "removed": float("nan")}, "below 1, got nan"),
    ],
)
def test_refused_in_one_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(KdcliError, match=message) as error:
        Pruning(**arguments)
    assert "\n" not in str(error.value)


def test_models_are_checked_by_their_configuration() -> None:
    import transformers

    llava = transformers.LlavaConfig(text_config=transformers.Qwen2Config(num_hidden_layers=4), image_token_id=3)
    Pruning("dart", layer=3, keep=4).check(llava)
    with pytest.raises(
        KdcliError, match="layer 4 is outside the model, whose layers are 0 to 3: nothing would be removed"
    ):
        Pruning("dart", layer=4, keep=4).check(llava)
    with pytest.raises(CompatibilityError, match="qwen3_vl_text language model: known are llama"):
        Pruning("dart", keep=4).check(transformers.Qwen3VLConfig())
    with pytest.raises(CompatibilityError, match="llama has no image_token_id"):
        Pruning("dart", keep=4).check(transformers.LlamaConfig())


@given(st.integers(0, 700), st.integers(1, 4), st.floats(0.0, 0.999), st.sampled_from([1.0, 2.0, 4.0]))
def test_counts(vision: int, images: int, removed: float, multiple: float) -> None:
    """At least one, at most all; of the fraction what is whole, as ``int`` has it; more is kept where less is removed."""
    kept = Pruning("random", removed=removed).kept(vision, images, multiple)
    assert kept == 0 if not vision else 1 <= kept <= vision
    if vision and multiple == 1.0:
        assert kept == max(1, int((1 - removed) * vision))
    assert Pruning("random", removed=removed / 2).kept(vision, images, multiple) >= kept
    assert Pruning("random", keep=64).kept(vision, images) == min(vision, 64 * images)


def test_depths() -> None:
    assert Pruning("fastv", layer=2, keep=1).depths(32) == {2: 1.0}
    assert Pruning("fastv", layer=32, keep=1).depths(32) == {}
    assert Pruning("fastv", keep=1).layer == 2 and Pruning("pyramiddrop").layer == 0
    assert Pruning("pyramiddrop").depths(32) == {8: 4.0, 16: 2.0, 24: 1.0}, "as released"
    assert Pruning("pyramiddrop").depths(3) == {0: 4.0, 1: 2.0, 2: 1.0}
    assert Pruning("pyramiddrop", layer=2).depths(32) == {9: 4.0, 17: 2.0, 24: 1.0}
    assert Pruning("pyramiddrop", layer=1, keep=3).depths(2) == {1: 1.0}
    assert Pruning("pyramiddrop", layer=2).depths(2) == {}


def seen_of(vision: list[int], attention: list[float] | None = None, **tensors: torch.Tensor) -> Seen:
    is_vision = torch.tensor(vision).bool()
    paid = None if attention is None else torch.tensor(attention)
    return Seen(is_vision, torch.ones_like(is_vision), paid, paid, **tensors)


@pytest.mark.parametrize("operator", ["fastv", "pyramiddrop"])
def test_attention_ranks_and_equals_keep_their_order(operator: str) -> None:
    seen = seen_of([0, 1, 1, 1, 1, 0], [9.0, 0.2, 0.5, 0.2, 0.2, 9.0])
    choose = operator_module(operator).choose
    assert choose(seen, 1).tolist() == [1]
    assert sorted(choose(seen, 3).tolist()) == [0, 1, 2]


def test_the_first_of_equals_is_kept() -> None:
    assert largest(torch.zeros(50), 3).tolist() == [0, 1, 2]


def test_dart_keeps_pivots_and_drops_their_duplicates() -> None:
    """Ten vision tokens: four with large keys; of the others, those like a pivot go first."""
    states = torch.zeros(12, 6)
    states[:4, 0] = 1.0  # pivots, all the same direction
    states[4:7, 0] = 2.0  # duplicates of them
    states[7:10, 1] = 1.0  # something else
    states[10:, 0] = 1.0  # text
    keys = torch.ones(12, 4)
    keys[:4] = 5.0
    seen = seen_of([1] * 10 + [0] * 2, keys=keys, normed=states)
    choose = operator_module("dart").choose
    assert sorted(choose(seen, 4).tolist()) == [0, 1, 2, 3]
    assert sorted(choose(seen, 7).tolist()) == [0, 1, 2, 3, 7, 8, 9]
    assert sorted(choose(seen, 2).tolist()) == [0, 1]


@given(st.integers(1, 60), st.integers(0, 9), st.data())
def test_dart_gives_exactly_what_is_asked(vision: int, text: int, data: Any) -> None:
    """Every count, with too little text for the pivots and with equal states: no token twice."""
    keep = data.draw(st.integers(1, vision))
    draw = torch.Generator().manual_seed(vision)
    states = torch.randint(-1, 2, (vision + text, 3), generator=draw).float()
    seen = seen_of([1] * vision + [0] * text, keys=states, normed=states)
    chosen = operator_module("dart").choose(seen, keep).tolist()
    assert len(chosen) == len(set(chosen)) == keep and set(chosen) <= set(range(vision))


def test_random_is_uniform_and_seeded() -> None:
    hits = torch.zeros(10)
    draw = torch.Generator().manual_seed(1)
    seen = Seen(torch.ones(10, dtype=torch.bool), torch.ones(10, dtype=torch.bool), generator=draw)
    choose = operator_module("random").choose
    for _ in range(2000):
        hits[choose(seen, 3)] += 1
    assert (hits / 2000 - 0.3).abs().max() < 0.05
    draw.manual_seed(5)
    first = choose(seen, 4)
    draw.manual_seed(5)
    assert torch.equal(first, choose(seen, 4))
