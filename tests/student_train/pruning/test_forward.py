"""The batched, hooked forward against the plain one: tokens kept, states, gradients; and what it must leave alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from student_train.pruning import Pruning, operator_modules
from student_train.pruning.forward import prune_vision
from teacher_cache.errors import CompatibilityError
from tests.close import assert_close
from tests.student_train.pruning.plain import CHOICES, pruned_states

OPERATORS = sorted(operator_modules())
ASKING = torch.tensor([20, 24, 8, 38, 19])
"""Row that ranks, by sample: inside the text behind the images, before the last tokens (which play the response)."""


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def run(model: Any, inputs: dict[str, Any], pruning: Pruning, **arguments: Any) -> tuple[torch.Tensor, Any]:
    with prune_vision(model, pruning, generator=seeded(), **arguments) as pruned:
        states = model.model(**inputs, use_cache=False).last_hidden_state
    return states, pruned


def plain(model: Any, samples: Any, pictures: Any, pruning: Pruning, asking: torch.Tensor) -> list[Any]:
    draw = seeded()
    return [
        pruned_states(model, ids, {"pixel_values": pixels}, pruning, int(at), images, draw)
        for (ids, images), pixels, at in zip(samples, pictures, asking)
    ]


def test_every_operator_has_a_plain_twin() -> None:
    assert sorted(CHOICES) == OPERATORS == ["dart", "fastv", "pyramiddrop", "random"]


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("amount", [{"removed": 0.6}, {"keep": 5}])
def test_values_are_the_plain_ones(
    tiny_llava: Any,
    samples: Any,
    pictures: Any,
    batch_of: Any,
    operator: str,
    implementation: str,
    amount: dict[str, Any],
) -> None:
    pruning = Pruning(operator, layer=2, **amount)
    expected = plain(tiny_llava(implementation="eager"), samples, pictures, pruning, ASKING)
    states, pruned = run(tiny_llava(implementation=implementation), batch_of(), pruning, query_at=ASKING)
    assert states.shape[1] == pruned.positions.shape[1] == max(len(rows) for _, rows in expected)
    for sample, (values, rows) in enumerate(expected):
        there = pruned.positions[sample] >= 0
        assert pruned.positions[sample, there].tolist() == rows == sorted(rows)
        assert_close(states[sample, there], values, 5e-5)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("amount", [{"removed": 0.6}, {"keep": 5}, {"keep": 1}])
def test_a_vision_token_that_asks_stays(
    tiny_llava: Any, samples: Any, pictures: Any, batch_of: Any, operator: str, amount: dict[str, Any]
) -> None:
    """As before a caption without a prompt: the last vision token predicts the first word, and is one of those that stay."""
    vision = [(ids == tiny_llava().config.image_token_id).nonzero()[:, 0] for ids, _ in samples]
    asking = torch.tensor([int(one[-1]) if len(one) else int(ASKING[n]) for n, one in enumerate(vision)])
    pruning = Pruning(operator, layer=2, **amount)
    expected = plain(tiny_llava(implementation="eager"), samples, pictures, pruning, asking)
    states, pruned = run(tiny_llava(), batch_of(), pruning, query_at=asking)
    before, _ = run(tiny_llava(), batch_of(), pruning, query_at=ASKING)
    assert states.shape[1] == before.shape[1], "as many as where text asks"
    for sample, (values, rows) in enumerate(expected):
        there = pruned.positions[sample] >= 0
        assert pruned.positions[sample, there].tolist() == rows and int(asking[sample]) in rows
        assert_close(states[sample, there], values, 5e-5)


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
@pytest.mark.parametrize("operator", ["dart", "fastv"])
def test_other_families(
    tiny_llava: Any, samples: Any, pictures: Any, batch_of: Any, family: str, operator: str
) -> None:
    pruning = Pruning(operator, layer=1, removed=0.5)
    expected = plain(tiny_llava(family, "eager"), samples, pictures, pruning, ASKING)
    states, pruned = run(tiny_llava(family), batch_of(), pruning, query_at=ASKING)
    for sample, (values, rows) in enumerate(expected):
        there = pruned.positions[sample] >= 0
        assert pruned.positions[sample, there].tolist() == rows
        assert_close(states[sample, there], values, 5e-5)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_are_the_plain_ones(
    tiny_llava: Any, samples: Any, pictures: Any, batch_of: Any, operator: str, checkpointed: bool
) -> None:
    """Of every weight, vision tower and embeddings included; recomputation under checkpointing sees the same tokens."""
    pruning = Pruning(operator, layer=2, removed=0.6)
    slow, fast = tiny_llava(implementation="eager"), tiny_llava()
    pull = torch.randn(97, 32, generator=torch.Generator().manual_seed(3))  # by token id
    total = sum(
        (values * pull[ids[rows]]).sum()
        for (values, rows), (ids, _) in zip(plain(slow, samples, pictures, pruning, ASKING), samples)
    )
    total.backward()
    if checkpointed:
        fast.train()
        fast.activation_checkpointing_enable({"use_reentrant": False})
    inputs = batch_of()
    states, pruned = run(fast, inputs, pruning, query_at=ASKING)
    there = pruned.positions >= 0
    pulls = pull[inputs["input_ids"].gather(1, pruned.positions.clamp_min(0))]
    (states * pulls)[there].sum().backward()
    compared = 0
    for (name, ours), theirs in zip(fast.named_parameters(), slow.parameters(), strict=True):
        if theirs.grad is not None and theirs.grad.abs().max() > 0:
            scale = float(theirs.grad.abs().max())
            assert_close(ours.grad, theirs.grad, 1e-4, max(scale, 1.0), name)
            compared += 1
    assert compared > 80


@pytest.mark.parametrize("operator", OPERATORS)
def test_nothing_removed_is_the_model_itself(tiny_llava: Any, batch_of: Any, operator: str) -> None:
    model, inputs = tiny_llava(), batch_of()
    untouched = model.model(**inputs, use_cache=False).last_hidden_state
    for pruning in (
        Pruning(operator, removed=0.0),
        Pruning(operator, keep=500),
        Pruning(operator, layer=6, removed=0.9),
    ):
        states, pruned = run(model, inputs, pruning)
        assert torch.equal(states, untouched)
        assert torch.equal(pruned.positions >= 0, inputs["attention_mask"].bool())
    assert not model.model._forward_pre_hooks and not any(one._forward_pre_hooks for one in model.modules())


@pytest.mark.parametrize("operator", OPERATORS)
def test_counts_are_exact_and_text_stays(tiny_llava: Any, samples: Any, batch_of: Any, operator: str) -> None:
    """By fraction of the sample, by image; every text token and only input rows; text-only rows whole."""
    model, inputs = tiny_llava(), batch_of()
    dart = operator == "dart"  # 4 image pivots, and eight times the same share
    for pruning, counts in (
        (Pruning(operator, removed=0.75), [4, 4, 0, 12 if dart else 8, 4]),
        (Pruning(operator, keep=3), [3, 3, 0, 6, 3]),
        (Pruning(operator, keep=1), [1, 1, 0, 2, 1]),
        (Pruning(operator, removed=0.99), [4, 4, 0, 4, 4] if dart else [1, 1, 0, 1, 1]),
    ):
        _, pruned = run(model, inputs, pruning, query_at=ASKING)
        for sample, (ids, _) in enumerate(samples):
            rows = pruned.positions[sample][pruned.positions[sample] >= 0]
            text = (ids != 5).nonzero()[:, 0].tolist()
            assert [row for row in rows.tolist() if ids[row] != 5] == text
            assert len(rows) == len(text) + counts[sample]


def test_more_vision_tokens_that_ask_than_may_stay(tiny_llava: Any, batch_of: Any) -> None:
    """Two images, each followed by an answer at once, and room for one token: both that ask stay, nothing else does."""
    inputs, last_of_each = batch_of(which=[3]), torch.tensor([[17, 36]])
    _, pruned = run(tiny_llava(), inputs, Pruning("pyramiddrop", keep=1), query_at=last_of_each, images=[1])
    kept = pruned.positions[0].tolist()
    assert [row for row in kept if inputs["input_ids"][0, row] == 5] == last_of_each[0].tolist()


def test_images_are_counted_by_the_caller_where_runs_mislead(tiny_llava: Any, batch_of: Any) -> None:
    inputs = batch_of(which=[3])
    pruning = Pruning("random", keep=4)
    _, by_runs = run(tiny_llava(), inputs, pruning)
    _, told = run(tiny_llava(), inputs, pruning, images=[1])
    assert by_runs.positions.shape[1] - told.positions.shape[1] == 4


@pytest.mark.parametrize("left", [False, True])
def test_rows_follow_their_tokens(tiny_llava: Any, batch_of: Any, left: bool) -> None:
    """Flat rows of the input point at the same tokens of the pruned states; the last column stays a token where it was one."""
    inputs = batch_of(left)
    states, pruned = run(tiny_llava(), inputs, Pruning("fastv", removed=0.7))
    flat = torch.arange(inputs["input_ids"].numel())
    rows = pruned.rows(flat)
    length, shorter = inputs["input_ids"].shape[1], states.shape[1]
    there = rows >= 0
    assert torch.equal(pruned.positions.flatten()[rows[there]], flat[there] % length)
    assert torch.equal(rows[there] // shorter, flat[there] // length)
    assert int(there.sum()) == int((pruned.positions >= 0).sum())
    text = (inputs["input_ids"] != 5) & inputs["attention_mask"].bool()
    assert (rows[text.flatten()] >= 0).all()
    if left:
        assert torch.equal(pruned.positions[:, -1], torch.full((len(states),), length - 1))


def test_a_batch_is_its_rows_one_by_one(tiny_llava: Any, samples: Any, batch_of: Any) -> None:
    model, pruning = tiny_llava(), Pruning("dart", layer=3, removed=0.5)
    together, pruned = run(model, batch_of(), pruning, query_at=ASKING)
    for one in range(len(samples)):
        alone, single = run(model, batch_of(which=[one]), pruning, query_at=ASKING[one : one + 1])
        there = pruned.positions[one] >= 0
        assert torch.equal(pruned.positions[one, there], single.positions[0])
        assert_close(together[one, there], alone[0], 5e-5)


@pytest.mark.parametrize("operator", ["fastv", "dart", "pyramiddrop"])
def test_responses_choose_nothing(tiny_llava: Any, batch_of: Any, operator: str) -> None:
    """Other tokens behind the asking row: the same vision tokens are kept."""
    model, inputs, pruning = tiny_llava(), batch_of(), Pruning(operator, removed=0.6)
    _, one = run(model, inputs, pruning, query_at=ASKING)
    columns = torch.arange(inputs["input_ids"].shape[1])
    behind = (columns > ASKING[:, None]) & inputs["attention_mask"].bool()
    other = {**inputs, "input_ids": inputs["input_ids"].masked_fill(behind, 50)}
    _, two = run(model, other, pruning, query_at=ASKING)
    assert torch.equal(one.positions, two.positions)
    if operator != "dart":
        _, last = run(model, other, pruning)
        assert not torch.equal(last.positions, one.positions)


def test_half_precision_is_finite_and_close(tiny_llava: Any, batch_of: Any) -> None:
    """bfloat16 weights, and float32 weights under autocast; the same tokens told, states near the float32 ones."""
    inputs, pruning = batch_of(), Pruning("random", removed=0.6)
    exact, _ = run(tiny_llava(), inputs, pruning, query_at=ASKING)
    for operator in OPERATORS:
        for implementation in ("sdpa", "eager"):
            half = copy.deepcopy(tiny_llava(implementation=implementation)).to(torch.bfloat16)
            low = {**inputs, "pixel_values": inputs["pixel_values"].to(torch.bfloat16)}
            states, pruned = run(half, low, Pruning(operator, removed=0.6), query_at=ASKING)
            assert torch.isfinite(states).all()
            states.float().square().mean().backward()
            assert all(torch.isfinite(one.grad).all() for one in half.parameters() if one.grad is not None)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                rounded, pruned = run(
                    tiny_llava(implementation=implementation), inputs, Pruning(operator, removed=0.6), query_at=ASKING
                )
            assert torch.isfinite(rounded).all()
            if operator == "random":
                there = pruned.positions >= 0
                assert (rounded.float() - exact)[there].square().mean().sqrt() < 0.1 * exact[
                    there
                ].square().mean().sqrt()


def test_pyramiddrop_goes_down_in_steps(tiny_llava: Any, batch_of: Any) -> None:
    """9 layers from layer 1: drops at 3, 5 and 7, half, a quarter, an eighth of 16 tokens left."""
    model = tiny_llava(layers=9)
    lengths: list[int] = []
    handles = [
        layer.self_attn.register_forward_pre_hook(
            lambda m, a, k: lengths.append(k["hidden_states"].shape[1]), with_kwargs=True
        )
        for layer in model.model.language_model.layers
    ]
    pruning = Pruning("pyramiddrop", layer=1)
    assert pruning.depths(9) == {3: 4.0, 5: 2.0, 7: 1.0}
    with prune_vision(model, pruning) as pruned:
        model.model(**batch_of(which=[0]), use_cache=False)
    assert lengths == [25, 25, 25, 17, 17, 13, 13, 11, 11] and pruned.positions.shape == (1, 11)
    for handle in handles:
        handle.remove()


def test_checkpointing_that_runs_hooks_again_is_refused(tiny_llava: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As older releases of transformers do; without checkpointing they are as good as any."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    monkeypatch.setattr(GradientCheckpointingLayer, "__call__", torch.nn.Module.__call__, raising=False)
    model, pruning = tiny_llava().train(), Pruning("random", keep=2)
    with prune_vision(model, pruning):
        pass
    model.activation_checkpointing_enable({"use_reentrant": False})
    with (
        pytest.raises(CompatibilityError, match="upgrade it, or set gradient_checkpointing"),
        prune_vision(model, pruning),
    ):
        pass


def test_a_second_forward_starts_anew(tiny_llava: Any, batch_of: Any) -> None:
    model, pruning = tiny_llava(), Pruning("fastv", removed=0.5)
    with prune_vision(model, pruning) as pruned:
        first = model.model(**batch_of(which=[0, 1]), use_cache=False).last_hidden_state
        model.model(**batch_of(which=[2, 3]), use_cache=False)
        again = model.model(**batch_of(which=[0, 1]), use_cache=False).last_hidden_state
    assert torch.equal(first, again) and pruned.positions.shape[0] == 2


def test_models_that_cannot_be_pruned(tiny_llava: Callable[..., Any], batch_of: Any) -> None:
    model = tiny_llava(layers=2)
    with prune_vision(model, Pruning("random", layer=1, keep=2)), pytest.raises(CompatibilityError, match="input_ids"):
        model.model(inputs_embeds=torch.zeros(1, 3, 32))
    assert not any(one._forward_pre_hooks for one in model.modules())
    model.model.language_model.config._attn_implementation = "flex_attention"
    with (
        pytest.raises(CompatibilityError, match=r"flex_attention.*choose from eager, sdpa"),
        prune_vision(model, Pruning("random", keep=2)),
    ):
        pass
